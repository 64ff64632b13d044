"""Process groups for words between hosts, which never meet the collectives of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh


def gloo_group(mesh: DeviceMesh, axis: str) -> ProcessGroup | None:
    """A new group of this rank and its peers along ``axis``, for tensors on the CPU; None where it has no peers.

    Collective over the whole mesh, whose dimensions are data and tensor parallelism.
    """
    ranks = mesh.mesh if axis == "tensor_parallel" else mesh.mesh.T
    return None if ranks.shape[1] == 1 else _new_group(ranks.tolist())


def gloo_group_of_all(mesh: DeviceMesh) -> ProcessGroup | None:
    """A new group of all ranks of the mesh, for tensors on the CPU; None where there is one only."""
    return None if mesh.size() == 1 else _new_group([mesh.mesh.flatten().tolist()])


def gather_numbers(numbers: Sequence[int], group: ProcessGroup) -> list[list[int]]:
    """The numbers of each rank of the group, as many and below 2**63 on each."""
    mine = torch.tensor(numbers, dtype=torch.int64)
    every = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(every, mine, group=group)
    return [each.tolist() for each in every]


def gather_objects(item: Any, group: ProcessGroup | None) -> list[Any]:
    """What each rank of the group gives, for what is rare."""
    if group is None:
        return [item]
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, item, group=group)
    return every


def _new_group(rows: list[list[int]]) -> ProcessGroup:
    mine = [dist.new_group(row, backend="gloo") for row in rows]  # every rank helps to make every group
    here = next(index for index, row in enumerate(rows) if dist.get_rank() in row)
    group = mine[here]
    assert isinstance(group, ProcessGroup)
    return group
