"""Shards of a parameter to and from the whole tensor, on any mesh and for any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.shards import copy_shard, gather_shards
from fabric_tp.styles.parameters import distribute_parameter
from fabric_tp.testing.ranks import mesh

MESHES = [(1, 2), (2, 2), (4, 1)]
PLACEMENTS = [Shard(0), Shard(1), Replicate()]
SHAPES = [(8, 4), (5, 4), (10, 6), (1, 4), (2, 2), (6, 4, 3)]
"""On 2 and 4 data-parallel ranks some of these leave the last ranks less than the others, or nothing."""


def example(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def parameter_of(whole: Tensor, placement: Placement, sizes: tuple[int, int]) -> DTensor:
    """As a parallelized model has it: split over tensor-parallel ranks first, then over data-parallel ones."""
    module = nn.Module()
    module.weight = distribute_parameter(nn.Parameter(whole.clone()), placement, mesh(*sizes)["tensor_parallel"])
    if sizes[0] > 1:
        fully_shard(module, mesh=mesh(*sizes)["data_parallel"])
    parameter = module.get_parameter("weight")
    assert isinstance(parameter, DTensor)
    return parameter


def divides(shape: tuple[int, ...], placement: Placement, sizes: tuple[int, int]) -> bool:
    """Tensor-parallel shards are equal, which a plan's check sees to; data-parallel ones need not be."""
    return not isinstance(placement, Shard) or shape[placement.dim] % sizes[1] == 0


CASES = [
    (shape, placement, sizes)
    for shape in SHAPES
    for placement in PLACEMENTS
    for sizes in MESHES
    if divides(shape, placement, sizes)
]


def gathers(shape: tuple[int, ...], placement: Placement, sizes: tuple[int, int]) -> None:
    whole = example(shape)
    gathered = gather_shards(parameter_of(whole, placement, sizes))
    assert type(gathered) is Tensor
    assert torch.equal(gathered, whole)


@pytest.mark.parametrize(("shape", "placement", "sizes"), CASES, ids=str)
def test_gather(pool, shape, placement, sizes) -> None:
    pool(sizes[0] * sizes[1])(gathers, shape, placement, sizes)


def copies(shape: tuple[int, ...], placement: Placement, sizes: tuple[int, int]) -> None:
    whole = example(shape)
    parameter, expected = (parameter_of(tensor, placement, sizes) for tensor in (torch.zeros_like(whole), whole))
    copy_shard(parameter, whole)
    assert torch.equal(parameter._local_tensor, expected._local_tensor)


@pytest.mark.parametrize(("shape", "placement", "sizes"), CASES, ids=str)
def test_copy(pool, shape, placement, sizes) -> None:
    pool(sizes[0] * sizes[1])(copies, shape, placement, sizes)


def equals_full_tensor(shape: tuple[int, ...], placement: Placement, sizes: tuple[int, int]) -> None:
    parameter = parameter_of(example(shape), placement, sizes)
    assert torch.equal(gather_shards(parameter), parameter.detach().full_tensor())


@pytest.mark.parametrize(("shape", "placement", "sizes"), CASES, ids=str)
def test_gather_equals_full_tensor(pool, shape, placement, sizes) -> None:
    pool(sizes[0] * sizes[1])(equals_full_tensor, shape, placement, sizes)


def keeps_the_parameter_a_leaf() -> None:
    whole = example((8, 4))
    parameter = parameter_of(torch.zeros_like(whole), Shard(0), (2, 2))
    copy_shard(parameter, whole)
    assert parameter.is_leaf
    assert parameter.requires_grad
    assert not gather_shards(parameter).requires_grad


def test_autograd_sees_nothing(pool) -> None:
    pool(4)(keeps_the_parameter_a_leaf)


def test_plain_tensors() -> None:
    whole, parameter = example((8, 4)), nn.Parameter(torch.zeros(8, 4))
    copy_shard(parameter, whole)
    assert torch.equal(gather_shards(parameter), whole)
