"""Targets: how many count, and where each is among the columns of one rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fabric_tp.autograd.collectives import Group


def count_targets(targets: Tensor | Iterable[Tensor], mesh: DeviceMesh, *, ignore_index: int = -100) -> Tensor:
    """What to divide the summed loss by, so that every target of the global batch weighs the same.

    Data-parallel ranks and micro-batches hold different numbers of targets that count: a mean of means would weigh
    targets of short samples more. FSDP2 averages gradients over the data-parallel ranks, hence the mean number and not
    the sum::

        count = fabric_tp.count_targets([targets for _, targets in micro_batches], fabric.strategy.device_mesh)
        for inputs, targets in micro_batches:
            loss = fabric_tp.cross_entropy(model(inputs), targets, reduction="sum") / count
            fabric.backward(loss)

    The mean over ranks (``fabric.all_reduce(loss)``) of the sum of these losses is the loss per target of the step.

    Args:
        targets: ``(...)``, of this rank's micro-batches of one step.
        mesh: With a dimension "data_parallel", the others seeing the same targets; one small all-reduce over it.
        ignore_index: As in :func:`cross_entropy`.

    Returns:
        A tensor ``()``: the targets of the global batch that are not ignored, divided by the data-parallel ranks; at
        least 1, so that a batch without any has the loss 0.
    """
    each = [targets] if isinstance(targets, Tensor) else list(targets)
    count = torch.stack([(t != ignore_index).sum() for t in each]).sum().float()
    if "data_parallel" in (mesh.mesh_dim_names or ()) and mesh["data_parallel"].size() > 1:
        dist.all_reduce(count, group=mesh.get_group("data_parallel"))
        count /= mesh["data_parallel"].size()
    return count.clamp(min=1)


class LocalTargets(NamedTuple):
    """Where the targets of some rows are among this rank's columns; ``(n,)`` each."""

    column: Tensor
    """0 for a target that is elsewhere."""
    elsewhere: Tensor
    """Whether it is another rank's column, or none because the target is ignored."""


@dataclass(frozen=True)
class Vocabulary:
    """The columns of the logits: each rank of ``group`` has the next ``ceil(v / t)``, and the last one what is left."""

    size: int
    """``v``, on all ranks."""
    group: Group

    def columns(self, rank: int) -> int:
        """How many a rank has."""
        share = -(-self.size // self.group.size)
        return max(0, min(share, self.size - share * rank))

    def first(self, rank: int) -> int:
        """Number of a rank's first column among all."""
        return -(-self.size // self.group.size) * rank

    def locate(self, targets: Tensor) -> LocalTargets:
        local = targets - self.first(self.group.rank)
        elsewhere = (local < 0) | (local >= self.columns(self.group.rank))
        return LocalTargets(local.masked_fill_(elsewhere, 0), elsewhere)
