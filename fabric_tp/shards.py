"""Whole tensors and the shards of a parameter, on any mesh: split over tensor-parallel, then data-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fabric_tp import _torch


@torch.no_grad()
def copy_shard(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of ``whole`` into ``parameter``; no communication."""
    if isinstance(parameter, DTensor):
        parameter._local_tensor.copy_(whole[own_region(parameter)])
    else:
        parameter.copy_(whole)


def own_region(parameter: Tensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the whole of ``parameter``."""
    region = [slice(0, size) for size in parameter.shape]
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis, dim in reversed(_splits(parameter)):
            start, stop = region[dim].start, region[dim].stop
            part = _chunk(stop - start, mesh.size(axis), mesh.get_local_rank(axis))
            region[dim] = slice(start + part.start, start + part.stop)
    return tuple(region)


@torch.no_grad()
def gather_shards(parameter: Tensor) -> Tensor:
    """The whole of ``parameter`` on every rank; all ranks of its mesh must call it."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    local, mesh = parameter._local_tensor.detach(), parameter.device_mesh
    sizes = [list(parameter.shape)]  # before each split, outermost first
    for axis, dim in reversed(_splits(parameter)):
        part = list(sizes[-1])
        part[dim] = len(range(part[dim])[_chunk(part[dim], mesh.size(axis), mesh.get_local_rank(axis))])
        sizes.append(part)
    for (axis, dim), before in zip(_splits(parameter), reversed(sizes[:-1]), strict=True):
        local = _gather_chunks(local, dim, before[dim], mesh.size(axis), mesh.get_group(axis).group_name)
    return local


def _splits(parameter: DTensor) -> list[tuple[int, int]]:
    """Mesh axis and tensor dim of each split, the innermost (data-parallel) first."""
    return [(axis, p.dim) for axis, p in enumerate(parameter.placements) if not p.is_replicate()]  # type: ignore[attr-defined]


def _chunk(length: int, size: int, rank: int) -> slice:
    step = -(-length // size)
    return slice(min(rank * step, length), min((rank + 1) * step, length))


def _gather_chunks(local: Tensor, dim: int, length: int, size: int, group_name: str) -> Tensor:
    """Concatenate the ranks' chunks, of which the last ones may be smaller or empty."""
    step = -(-length // size)
    shape = list(local.shape)
    shape[dim] = step
    padded = local.new_zeros(shape)
    padded.narrow(dim, 0, local.shape[dim]).copy_(local)
    return torch.cat(_torch.all_gather(padded, size, group_name).chunk(size), dim).narrow(dim, 0, length).contiguous()
