"""A parameter's local part, and the gradient that comes back through it, are those of ``DTensor.to_local``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.local import local_part
from fabric_tp.testing.ranks import mesh


def gradients(placement: Placement, grad_placement: Placement, transposed: bool) -> list[DTensor]:
    """On a rank: of both ways, from a gradient that lies as the parameter does or not."""
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    values = DTensor.from_local(whole, mesh(1, 2)["tensor_parallel"], [placement], run_check=False)
    ways: list[Callable[[DTensor], Tensor]] = [
        lambda parameter: local_part(parameter, [grad_placement]),
        lambda parameter: parameter.to_local(grad_placements=[grad_placement]),
    ]
    found = []
    for way in ways:
        parameter = nn.Parameter(values.detach().clone())
        local = way(parameter)  # type: ignore[arg-type]
        seed = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).t()
        local.backward(seed if transposed else seed.contiguous())
        assert isinstance(parameter.grad, DTensor)
        found.append(parameter.grad)
    return found


def are_the_same(*args: object) -> bool:
    one, other = gradients(*args)  # type: ignore[arg-type]
    same = one.placements == other.placements and one.shape == other.shape and one.stride() == other.stride()
    locals_ = one._local_tensor, other._local_tensor
    return same and torch.equal(*locals_) and one._local_tensor.is_contiguous() and type(one) is type(other)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("placement", "grad_placement"), [(Shard(0), Shard(0)), (Shard(1), Shard(1)), (Replicate(), Partial())], ids=str
)
def test_gradients(pool, placement, grad_placement, transposed) -> None:
    assert pool(2)(are_the_same, placement, grad_placement, transposed)


def second_derivative() -> Tensor:
    whole = torch.arange(1.0, 7.0)
    values = DTensor.from_local(whole, mesh(1, 2)["tensor_parallel"], [Shard(0)], run_check=False)
    parameter = nn.Parameter(values)
    (grad,) = torch.autograd.grad(local_part(parameter, [Shard(0)]).pow(3).sum(), parameter, create_graph=True)  # type: ignore[arg-type]
    grad.to_local().sum().backward()
    assert isinstance(parameter.grad, DTensor)
    return parameter.grad.to_local()


def test_has_second_derivatives(pool) -> None:
    assert torch.equal(pool(2)(second_derivative), 6 * torch.arange(1.0, 7.0))
