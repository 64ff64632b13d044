"""Gradient clipping over the ranks of a mesh, for any mix of plain tensors and DTensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from fabric_tp import _torch


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    mesh: DeviceMesh,
    *,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    names: Mapping[nn.Parameter, str] | None = None,
) -> Tensor:
    """Scale all gradients in place so that the norm of them together is at most ``max_norm``.

    The arguments are those of ``torch.nn.utils.clip_grad_norm_``. One all-reduce of one number: each element of the
    gradients is counted by one of the ranks that hold it. Norms are taken in fp32 or better.

    Args:
        parameters: Their gradients may be DTensors on any of the mesh's dimensions, or plain tensors that are the same
            on all ranks.
        mesh: All ranks, with named dimensions.
        names: For the message about a gradient that is not finite.

    Returns:
        The norm before clipping, a plain tensor ``()`` that is the same on every rank.

    Raises:
        RuntimeError: ``error_if_nonfinite`` and the norm is nan or infinite; the same on every rank.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [_local_gradient(parameter) for parameter in parameters]
    counted = [g for p, g in zip(parameters, gradients, strict=True) if g.numel() and _counts(p.grad, mesh)]
    total = _norm(counted, norm_type, mesh)
    if error_if_nonfinite and not torch.isfinite(total):
        _raise_nonfinite(parameters, gradients, total, names or {})
    if gradients:
        _torch.foreach_mul_(gradients, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total


@torch.no_grad()
def clip_grad_value(parameters: Iterable[nn.Parameter], clip_value: float) -> None:
    """Clamp each element of the gradients to ``[-clip_value, clip_value]`` in place."""
    for parameter in parameters:
        if parameter.grad is not None:
            _local_gradient(parameter).clamp_(-clip_value, clip_value)


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of the gradient; what is still a partial sum is summed first."""
    grad = parameter.grad
    assert grad is not None
    if not isinstance(grad, DTensor):
        return grad
    if any(placement.is_partial() for placement in grad.placements):
        summed = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
        parameter.grad = grad = grad.redistribute(placements=summed)
    return grad.to_local()


def _counts(grad: Tensor | None, mesh: DeviceMesh) -> bool:
    """Of the ranks that hold the same part of a gradient, one counts it: the first along each dimension of the mesh."""
    sharded: set[str] = set()
    if isinstance(grad, DTensor):
        names = grad.device_mesh.mesh_dim_names
        if names is None or not set(names) <= set(mesh.mesh_dim_names or ()):
            raise ValueError(
                f"A gradient lies on the mesh {grad.device_mesh}, which is no part of {mesh}: its norm cannot be put"
                " together with the others'. Parallelize with the mesh that the strategy hands to parallelize_fn."
            )
        sharded = {name for name, place in zip(names, grad.placements, strict=True) if not place.is_replicate()}
    return all(name in sharded or mesh.get_local_rank(name) == 0 for name in mesh.mesh_dim_names or ())


def _norm(gradients: list[Tensor], norm_type: float, mesh: DeviceMesh) -> Tensor:
    norms = _torch.foreach_norms(gradients, norm_type)
    norm = torch.stack(norms) if norms else torch.zeros(1, device=mesh.device_type)
    if math.isinf(norm_type):
        total = norm.max()
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return total
    total = norm.pow(norm_type).sum()
    dist.all_reduce(total)
    return total.pow(1 / norm_type)


def _raise_nonfinite(
    parameters: list[nn.Parameter], gradients: list[Tensor], total: Tensor, names: Mapping[nn.Parameter, str]
) -> None:
    bad = [i for i, gradient in enumerate(gradients) if not torch.isfinite(gradient).all()]
    first = torch.tensor(bad[0] if bad else len(gradients), device=total.device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    which = "no single gradient is, but their norm is"
    if int(first) < len(parameters):
        which = f"the first gradient that is not finite is that of {names.get(parameters[int(first)], int(first))}"
    raise RuntimeError(
        f"The norm of the gradients is {total.item()}: {which}. Lower the learning rate, look at the data of this step,"
        " or pass error_if_nonfinite=False to go on."
    )
