"""Each collective against a plain computation on all ranks' tensors, and its backward against its conjugate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fabric_tp.autograd import collectives
from fabric_tp.autograd.collectives import Group
from fabric_tp.testing.ranks import mesh

Reference = Callable[[Sequence[Tensor], int, int], Tensor]
"""From all ranks' tensors, this rank and the dim to this rank's tensor."""


def own(xs: Sequence[Tensor], rank: int, dim: int) -> Tensor:
    return xs[rank]


def total(xs: Sequence[Tensor], rank: int, dim: int) -> Tensor:
    return torch.stack(list(xs)).sum(0)


def joined(xs: Sequence[Tensor], rank: int, dim: int) -> Tensor:
    return torch.cat(list(xs), dim)


def part_of_total(xs: Sequence[Tensor], rank: int, dim: int) -> Tensor:
    return total(xs, rank, dim).chunk(len(xs), dim)[rank]


def own_part(xs: Sequence[Tensor], rank: int, dim: int) -> Tensor:
    return xs[rank].chunk(len(xs), dim)[rank]


EVERYWHERE: dict[str, tuple[Reference, Reference]] = {"copy": (own, total), "reduce": (total, own)}
"""Forward and backward."""
ALONG: dict[str, tuple[Reference, Reference]] = {
    "gather": (joined, part_of_total),
    "reduce_scatter": (part_of_total, joined),
    "gather_replicated": (joined, own_part),
}
SHAPES = [((1, 4, 8), 1), ((3, 4, 8), 1), ((4, 3, 5), 0), ((1, 3, 4), -1), ((3, 2, 4), -1), ((1, 1, 4), -1)]


def leaves(shape: Sequence[int], size: int, seed: int) -> list[Tensor]:
    """One tensor for each rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(size)]


def run(name: str, shape: Sequence[int], dim: int | None, size: int) -> None:
    group = Group.of(mesh(1, size)["tensor_parallel"])
    forward, backward = {**EVERYWHERE, **ALONG}[name]
    xs = leaves(shape, size, seed=0)
    x = xs[group.rank].requires_grad_()
    function = getattr(collectives, name)
    y = function(x, group) if dim is None else function(x, group, dim)
    torch.testing.assert_close(y, forward(xs, group.rank, dim or 0), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous()
    gradients = leaves(y.shape, size, seed=1)
    y.backward(gradients[group.rank])
    torch.testing.assert_close(x.grad, backward(gradients, group.rank, dim or 0), rtol=1e-12, atol=1e-12)


def is_view(name: str, shape: Sequence[int], size: int) -> bool:
    group = Group.of(mesh(1, size)["tensor_parallel"])
    x = leaves(shape, size, seed=0)[group.rank].requires_grad_()
    return getattr(collectives, name)(x, group)._is_view()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("name", ALONG)
def test_along_a_dim(pool, name, shape, dim, size) -> None:
    pool(size)(run, name, shape, dim, size)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", [(1, 4, 8), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_of_whole_tensors(pool, name, shape, size) -> None:
    pool(size)(run, name, shape, None, size)


@pytest.mark.parametrize("name", ["gather", "reduce_scatter"])
def test_default_dim_is_the_sequence(pool, name) -> None:
    pool(2)(default_equals_dim_1, name)


def default_equals_dim_1(name: str) -> None:
    group = Group.of(mesh(1, 2)["tensor_parallel"])
    x = leaves((2, 4, 6), 2, seed=0)[group.rank]
    function = getattr(collectives, name)
    assert torch.equal(function(x, group), function(x, group, 1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["reduce", "gather", "reduce_scatter", "gather_replicated"])
def test_result_is_no_view(pool, name, batch) -> None:
    """FSDP2 warns of modules that return views; what ``copy`` returns stays inside a module."""
    assert not pool(2)(is_view, name, (batch, 4, 8), 2)


@pytest.mark.parametrize("name", [*EVERYWHERE, *ALONG])
def test_one_rank_does_nothing(name) -> None:
    x = torch.randn(2, 4, 8)
    assert getattr(collectives, name)(x, Group(name="", size=1, rank=0)) is x
