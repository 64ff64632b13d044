"""Let all ranks end a pass together, so that none waits in a collective for one that has no batch left."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import has_iterable_dataset, sized_len
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch.distributed import ProcessGroup

from fabric_tp.data.groups import gather_objects


def own_length(dataloader: Any) -> tuple[int | None, bool]:
    """How many batches this rank has, None if nobody knows, and whether that is certain.

    It is not of an IterableDataset, which may give more or fewer, nor of a dataloader that can resume within a pass.
    """
    length = sized_len(dataloader)
    resumes = hasattr(dataloader, "load_state_dict")
    return length, length is not None and not resumes and not has_iterable_dataset(dataloader)


def agreed_length(
    lengths: list[tuple[int | None, bool]], tensor_parallel_size: int, dataloader: int
) -> tuple[int | None, bool]:
    """How many batches a pass has, and whether that is certain, from :func:`own_length` of all loading ranks.

    Args:
        lengths: By rank.
        tensor_parallel_size: How many ranks in a row load the same batches.
        dataloader: Its number, for messages.

    Raises:
        ValueError: Ranks that load the same batches have different numbers of them.
    """
    known = [length for length, _ in lengths]
    for first in range(0, len(known), tensor_parallel_size):
        group = known[first : first + tensor_parallel_size]
        if len(set(group)) > 1:
            raise ValueError(
                f"Dataloader {dataloader} has {group} batches on the ranks from {first} on, which are one"
                " tensor-parallel group and must get the same. Give them the same dataset and sampler, or pass"
                " broadcast_inputs=True to the strategy."
            )
    if any(length is None for length in known):
        return None, False
    shortest = min(length for length in known if length is not None)
    if any(length != shortest for length in known):
        rank_zero_warn(
            f"Dataloader {dataloader} has {known[::tensor_parallel_size]} batches on the data-parallel ranks. All of"
            f" them stop after {shortest}."
        )
    return shortest, all(certain for _, certain in lengths)


class InStep:
    """Ends the passes of a dataloader of unknown length on all ranks with the first that has no batch left.

    Args:
        group: The ranks that load, on the CPU.
        tensor_parallel_size: How many of them in a row load the same batches.
        dataloader: Its number, for messages.
    """

    def __init__(self, group: ProcessGroup, tensor_parallel_size: int, dataloader: int) -> None:
        self._group, self._tensor_parallel_size, self._dataloader = group, tensor_parallel_size, dataloader

    def all_have(self, number: int, index: int, here: bool) -> bool:
        """Whether every rank has batch ``index`` of pass ``number``; collective.

        Raises:
            ValueError: On every rank: they are at different batches, or ranks that load the same batches do not end
                together.
        """
        place = (number << 32) + index
        least = torch.tensor([here, place, -place], dtype=torch.int64)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._group)
        if least[0] == 1 and least[1] == -least[2]:
            return True
        every = gather_objects((number, index, here), self._group)
        ranks = dist.get_process_group_ranks(self._group)
        if least[1] != -least[2]:
            places = ", ".join(
                f"batch {i} of pass {n} on rank {rank}" for rank, (n, i, _) in zip(ranks, every, strict=True)
            )
            raise ValueError(
                f"Dataloader {self._dataloader}, whose length is not known, is at {places}. All ranks must iterate it"
                " together: look at a batch, as with next(iter(dataloader)), on all of them or in a dataloader of its"
                " own."
            )
        size = self._tensor_parallel_size
        for first in range(0, len(ranks), size):
            ended = [
                rank
                for rank, (_, _, has) in zip(ranks, every, strict=True)
                if not has and rank in ranks[first : first + size]
            ]
            if 0 < len(ended) < size:
                raise ValueError(
                    f"Dataloader {self._dataloader} has ended after {index} batches on ranks {ended}, but not on the"
                    f" others of their tensor-parallel group {ranks[first : first + size]}, which must get the same."
                    " Give them the same dataset, or pass broadcast_inputs=True to the strategy."
                )
        return False
