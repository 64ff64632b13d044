from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from fabric_tp import _torch
from fabric_tp.seeds import mix
from fabric_tp.styles.collectives import SEQUENCE_DIM
from fabric_tp.styles.heads import ShardHeads
from fabric_tp.styles.masks import Mask, dropout
from fabric_tp.styles.prepare import Unsharded
from fabric_tp.styles.style import Layout, LocalModule, Style

FORWARDS = 16
"""So many forwards of the model may wait for their backward at once, where activations are checkpointed."""


@dataclass
class Forward:
    """A training forward of the model."""

    first: int = 0
    """Number, within the run, of its first sample on the first data-parallel rank."""
    batch: int = 0
    """Samples on each data-parallel rank."""
    calls: dict[str, int] = field(default_factory=dict)
    """How often each module was called."""
    records: dict[int, int] = field(default_factory=dict)
    """For the number that each call drew, how many calls of the same module came before it."""


class RunPosition:
    """Where in the run a model is: what its random masks depend on, besides the seed and the modules' names.

    Sample i of a training forward on data-parallel rank r of d has the number ``samples + i * d + r``, if ``samples``
    came before it in the whole run. This is how distributed samplers deal samples out, so that a sample has the same
    number on any mesh and in micro-batches of any size. Each data-parallel rank must take equally many.

    A forward that is repeated in the backward, by activation checkpointing, gets the masks of the first time: each call
    draws a number from torch's generator, whose state checkpointing restores, and finds its record by it. The number
    itself has no influence on the masks.
    """

    def __init__(self, seed: int, data_parallel_rank: int = 0, data_parallel_size: int = 1) -> None:
        self.seed = seed
        self.samples = 0
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self._forwards = deque([Forward()], maxlen=FORWARDS)

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.samples = int(state["seed"]), int(state["samples"])

    @torch.compiler.disable
    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook of the model: the samples are the rows of its first tensor."""
        if not module.training or _torch.current_backward() != -1:
            return
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim())
        batch = next((len(tensor) for tensor in tensors), 0)
        self._forwards.append(Forward(self.samples, batch))
        self.samples += batch * self.data_parallel_size

    def call(self, name: str) -> tuple[Forward, int]:
        """The forward to which a call of this module belongs, and how many calls of the module came before in it.

        Raises:
            ValueError: The module runs again, in the backward, and no record of the first time is found.
        """
        token = _torch.draw()
        if _torch.current_backward() != -1:
            for forward in reversed(self._forwards):
                if token in forward.records:
                    return forward, forward.records[token]
            raise ValueError(
                f"{name} runs again in the backward, and what its random mask was in the forward is not known. Either"
                " activations were checkpointed with preserve_rng_state=False, which must be True for random masks, or"
                f" more than {FORWARDS} forwards came before this backward."
            )
        forward = self._forwards[-1]
        number = forward.records[token] = forward.calls.get(name, 0)
        forward.calls[name] = number + 1
        return forward, number

    def mask(self, name: str, rate: float, x: Tensor, shard_dim: int | None, shard_rank: int) -> Mask:
        """The mask for this call of a module, whose input ``x`` has samples, the same on all ranks, in dim 0."""
        forward, number = self.call(name)
        if x.shape[0] == forward.batch:
            key = mix(self.seed, name, number)
            first, stride = forward.first + self.data_parallel_rank, self.data_parallel_size
        else:  # such as the tokens of an expert, of which nobody knows the samples
            key = mix(self.seed, name, number, forward.first, self.data_parallel_rank)
            first, stride = 0, 1
        return Mask(rate, key, first, stride, shard_dim, shard_rank)

    @contextmanager
    def seeded(self, name: str, device: torch.device, tensor_parallel_rank: int) -> Iterator[None]:
        """Run something with torch's generators in a state of this call's own, on this rank; then restore theirs."""
        forward, number = self.call(name)
        seed = mix(self.seed, name, number, forward.first, self.data_parallel_rank, tensor_parallel_rank)
        devices = [device] if device.type != "cpu" else []
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(seed % 2**63)
            yield


def follow_run(model: nn.Module, mesh: DeviceMesh, seed: int) -> RunPosition:
    """Give the model's parallelized dropouts the position that their masks depend on.

    The model's training forwards advance it from here on.
    """
    replicas = mesh["data_parallel"] if "data_parallel" in (mesh.mesh_dim_names or ()) else None
    position = RunPosition(seed, *((replicas.get_local_rank(), replicas.size()) if replicas is not None else ()))
    for name, module in model.named_modules():
        if isinstance(module, Follower):
            module.follow(position, name)
    model.register_forward_pre_hook(position.begin, with_kwargs=True)
    return position


def has_followers(model: nn.Module) -> bool:
    return any(isinstance(module, Follower) for module in model.modules())


def run_position(model: nn.Module) -> RunPosition | None:
    """The position that :func:`follow_run` gave to the model, if it did."""
    return next((module.position for module in model.modules() if isinstance(module, Follower)), None)


class Follower(LocalModule):
    """A parallelized module that computes with random numbers."""

    position: RunPosition | None = None
    name_in_model: str = ""

    def follow(self, position: RunPosition, name: str) -> None:
        self.position, self.name_in_model = position, name

    def followed(self) -> RunPosition:
        if self.position is None:
            raise ValueError(
                f"This {type(self).__name__} does not know the seed. fabric_tp.from_plan(plan) tells it when it"
                " parallelizes the model; torch's own parallelize_module does not."
            )
        return self.position


class _Dropout(Follower):
    def compute(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.training and self.p else super().compute(x)

    @torch.compiler.disable
    def drop(self, x: Tensor) -> Tensor:
        style, group = self.parallelized.style, self.parallelized.group
        assert isinstance(style, Dropout)
        shard_dim = style.shard_dim(x) if group.size > 1 else None
        mask = self.followed().mask(self.name_in_model, float(self.p), x, shard_dim, group.rank)  # type: ignore[arg-type]
        return dropout(x, mask, inplace=bool(self.inplace))


class Dropout(Style):
    """An ``nn.Dropout`` that drops the same elements of the same samples on every mesh.

    Ranks that hold the same elements drop the same of them, and ranks that hold different ones have their part of one
    mask. It depends on the seed, the name of the module, how often it was called before in the same forward, the number
    of the sample in the run (see :class:`RunPosition`) and the place in the sample: not on the mesh, on sequence
    parallelism, on how a batch is split into micro-batches, or on activation checkpointing. Where dim 0 is not the
    batch, as in mixtures of experts, it depends on the data-parallel rank and the micro-batch too.

    Args:
        layout: How the input lies.
        reduced_features: With ``"features"``: an input with so many of them is what the row-wise layer of the same
            module made of the shards, and lies as ``reduced_layout``. For a module with one ``nn.Dropout`` for both.
        reduced_layout: As ``layout``.

    ===============  =====================================================
    layout           x, y
    ===============  =====================================================
    ``"replicate"``  (b, ...): the same on each rank
    ``"sequence"``   (b, s/t, ...)
    ``"features"``   (b, ..., f/t); with four dimensions (b, heads/t, ...)
    ===============  =====================================================
    """

    module_class = _Dropout

    def __init__(
        self,
        layout: Layout | Literal["features"] = "replicate",
        *,
        reduced_features: int | None = None,
        reduced_layout: Layout = "replicate",
    ) -> None:
        if layout not in ("replicate", "sequence", "features"):
            raise ValueError(f"layout={layout!r} is not known; it must be one of 'replicate', 'sequence', 'features'.")
        self.layout = layout
        self.reduced_features, self.reduced_layout = reduced_features, reduced_layout

    def validate(self, module: nn.Module) -> None:
        if not is_dropout(module):
            raise ValueError(f"Dropout takes a torch.nn.Dropout, and this is a {type(module).__name__}.")

    def shard_dim(self, x: Tensor) -> int | None:
        """The dimension of ``x`` of which each rank has a part."""
        if self.layout == "features" and x.dim() == 4:
            return 1
        reduced = self.layout == "features" and x.shape[-1] == self.reduced_features
        layout = self.reduced_layout if reduced else self.layout
        return {"replicate": None, "sequence": SEQUENCE_DIM, "features": x.dim() - 1}[layout]


class _RandomModule(Follower):
    @torch.compiler.disable
    def compute(self, *args: Any, **kwargs: Any) -> Any:
        this = self.parallelized
        if not self.training:
            return super().compute(*args, **kwargs)
        part = this.group.rank if isinstance(this.style, RandomHeads) else 0
        with self.followed().seeded(self.name_in_model, torch.device(this.mesh.device_type), part):
            return super().compute(*args, **kwargs)


class RandomHeads(ShardHeads):
    """An attention module with dropout inside its kernel, which draws from torch's generator.

    It draws from a state of its own, made of the seed, the call and the rank: other masks on other ranks, other
    samples and in other calls, and the same when activations are computed again. Unlike :class:`Dropout`'s they do
    depend on the mesh, since no kernel lets others choose its mask.
    """

    module_class = _RandomModule


class RandomUnsharded(Unsharded):
    """As :class:`RandomHeads`, for an attention module that every rank computes whole, with the same masks."""

    module_class = _RandomModule


def is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and type(module).forward is nn.Dropout.forward
