"""All that a strategy does about the inputs of a tensor-parallel model."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, IterDataPipe, MapDataPipe

from fabric_tp.data.broadcast import Broadcast
from fabric_tp.data.groups import gather_objects, gloo_group, gloo_group_of_all
from fabric_tp.data.lengths import InStep, agreed_length, own_length
from fabric_tp.data.loader import ParallelDataLoader, Setup
from fabric_tp.data.repair import Preparation
from fabric_tp.data.verify import Verifier
from fabric_tp.seeds import mix

PREFETCH = 2


class Inputs:
    """Gives all ranks of a tensor-parallel group the same inputs, or finds out that they are not the same.

    Collective over the mesh, as are :meth:`check_seeds` and :meth:`setup`.

    Args:
        mesh: Of the dimensions ``("data_parallel", "tensor_parallel")``.
        verify_inputs: Compare the batches of each tensor-parallel group: the first of each pass over a dataloader and
            each so many after it. Where no dataloader has been set up, the model's inputs. 0 never compares.
        broadcast_inputs: Only the first rank of each group loads, the others receive.
    """

    def __init__(self, mesh: DeviceMesh, *, verify_inputs: int = 100, broadcast_inputs: bool = False) -> None:
        if verify_inputs < 0:
            raise ValueError(
                f"verify_inputs={verify_inputs} must be 0 (never) or the number of batches between checks."
            )
        self._mesh = mesh
        self._data_parallel_rank = mesh.get_local_rank("data_parallel")
        self._data_parallel_size, self._tensor_parallel_size = mesh.size(0), mesh.size(1)
        self._broadcasts = broadcast_inputs and self._tensor_parallel_size > 1
        self._all = gloo_group_of_all(mesh)
        self._verifier: Verifier | None = None
        if verify_inputs and self._all:
            groups = (gloo_group(mesh, "tensor_parallel"), gloo_group(mesh, "data_parallel"))
            self._verifier = Verifier(verify_inputs, *groups)
        self._loaders: list[ParallelDataLoader] = []
        self._forwards = 0

    def check_seeds(self) -> None:
        """Find out whether the user has seeded ranks differently.

        Raises:
            ValueError: On every rank, if ``PL_GLOBAL_SEED``, which seed_everything() sets, is not the same on all.
        """
        seeds = gather_objects(os.environ.get("PL_GLOBAL_SEED"), self._all)
        if len(set(seeds)) > 1:
            raise ValueError(
                f"seed_everything() was called with different seeds: {seeds} by rank. Then the ranks of a"
                " tensor-parallel group shuffle and augment differently. Give all ranks the same seed: data-parallel"
                " ranks get different data, and dropout is different where it must be, without that."
            )

    def setup(self, dataloader: DataLoader) -> ParallelDataLoader:
        """Repair what can be repaired, and refuse what cannot; the last step of ``fabric.setup_dataloaders``.

        Raises:
            ValueError: On every rank: a sampler or dataset was made for other ranks, seeds differ
                (:meth:`check_seeds`), or the ranks of a tensor-parallel group have different numbers of batches.
        """
        self.check_seeds()
        number = len(self._loaders)
        loads = not self._broadcasts or self._mesh.get_local_rank("tensor_parallel") == 0
        seed = mix(gather_objects(_seed_of_this_rank(), self._all)[0], number)
        preparation, error = self._prepare(dataloader, seed) if loads else (None, None)
        own = own_length(dataloader) if loads and not error else (None, False)
        every = gather_objects((error, own), self._all)
        if errors := [message for message, _ in every if message]:
            raise ValueError(errors[0])
        ranks_per_group = 1 if self._broadcasts else self._tensor_parallel_size
        step = self._tensor_parallel_size if self._broadcasts else 1
        length, exact = agreed_length([each for _, each in every[::step]], ranks_per_group, number)
        in_step = self._in_step(number) if not exact else None
        broadcast = self._broadcast(dataloader, in_step) if self._broadcasts else None
        setup = Setup(
            number=number,
            length=length,
            exact=exact,
            progress=lambda: self._forwards,
            preparation=preparation,
            in_step=in_step,
            broadcast=broadcast,
            verifier=self._verifier,
        )
        self._loaders.append(ParallelDataLoader(dataloader, setup))
        return self._loaders[-1]

    @torch.compiler.disable
    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook (``with_kwargs=True``) of the whole model, on all ranks.

        Raises:
            ValueError: On all ranks of the group: their inputs are not the same.
        """
        if self._verifier:
            self._verifier.check((args, kwargs))
        self._forwards += 1

    def _prepare(self, dataloader: DataLoader, seed: int) -> tuple[Preparation | None, str | None]:
        """Or the message, so that a rank that fails does not leave the others waiting."""
        if self._broadcasts and isinstance(dataloader.dataset, (IterDataPipe, MapDataPipe)):
            return None, (
                "broadcast_inputs=True does not work with datapipes: torch's DataLoader lets all ranks meet at the"
                " start of each pass over one, but only one rank of each group loads. Shard it by"
                " **fabric.strategy.distributed_sampler_kwargs and leave broadcast_inputs off."
            )
        try:
            preparation = Preparation(
                dataloader,
                data_parallel_rank=self._data_parallel_rank,
                data_parallel_size=self._data_parallel_size,
                tensor_parallel_size=self._tensor_parallel_size,
                seed=seed,
            )
        except ValueError as error:
            return None, str(error)
        return preparation, None

    def _in_step(self, number: int) -> InStep | None:
        """Of a group of its own: transfers use it in a thread."""
        if self._broadcasts:
            group = gloo_group(self._mesh, "data_parallel")
            return InStep(group, 1, number) if group else None
        group = gloo_group_of_all(self._mesh)
        return InStep(group, self._tensor_parallel_size, number) if group else None

    def _broadcast(self, dataloader: DataLoader, in_step: InStep | None) -> Broadcast:
        group = gloo_group(self._mesh, "tensor_parallel")
        assert group is not None
        pin_memory = bool(getattr(dataloader, "pin_memory", False))
        return Broadcast(group, in_step=in_step, prefetch=PREFETCH, pin_memory=pin_memory)


def _seed_of_this_rank() -> int:
    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed else torch.initial_seed()
