"""Which heads a rank computes, of any number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fabric_tp.autograd.collectives import Group
from fabric_tp.styles import Colwise, Heads
from fabric_tp.styles.parameters import distribute_parameter
from fabric_tp.testing.ranks import mesh


@pytest.mark.parametrize(("query", "key_value"), [(8, 2), (12, 3), (14, 2), (15, 15), (9, 3), (71, 1), (28, 4)])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_each_query_head_meets_its_key_head(query, key_value, size) -> None:
    heads = Heads(query, key_value)
    pairs = []
    for rank in range(size):
        first = rank * heads.local_query(size)
        if heads.splits_key_value(size):
            keys = list(range(rank * heads.local_key_value(size), (rank + 1) * heads.local_key_value(size)))
        else:
            keys = heads.key_value_heads(size, rank)
        assert len(keys) == heads.local_key_value(size)
        pairs += [(first + i, keys[i // heads.group_size(size)]) for i in range(heads.local_query(size))]
    there = [pair for pair in pairs if pair[0] < query]  # after these, heads of zeros
    assert there == [(i, i // (query // key_value)) for i in range(query)]


@pytest.mark.parametrize("rank", range(4))
def test_own_is_filled_with_zeros(rank) -> None:
    of_all = torch.arange(1.0, 7)
    own = Heads(6, 6).own(of_all, Group("", 4, rank), 0)
    expected = [[1, 2], [3, 4], [5, 6], [0, 0]][rank]
    assert own.tolist() == expected


def completed(dim: int) -> None:
    """Five heads of six features over four ranks, which store 8, 8, 8 and 6 rows and compute 12, 12, 6 and none."""
    whole = torch.arange(30.0)[:, None] * torch.tensor([1.0, 100.0])
    whole = whole if dim == 0 else whole.t()
    layer = nn.Linear(2, 30) if dim == 0 else nn.Linear(30, 2)
    layer.weight = nn.Parameter(whole.clone())
    tensor_parallel = mesh(1, 4)["tensor_parallel"]
    group, heads = Group.of(tensor_parallel), Heads(5, 5)
    placement = Colwise().placements(layer)["weight"] if dim == 0 else torch.distributed.tensor.Shard(1)
    shard = distribute_parameter(layer.weight, placement, tensor_parallel)
    local = shard.to_local()
    assert local.shape[dim] == [8, 8, 8, 6][group.rank]
    complete = heads.complete(local, group, dim, 30)
    filled = torch.cat([whole, whole.new_zeros(18, 2) if dim == 0 else whole.new_zeros(2, 18)], dim)
    torch.testing.assert_close(complete, filled.narrow(dim, group.rank * 12, 12))
    complete.backward(complete.detach() + 1)  # what is beyond the last head has no gradient
    assert shard.grad is not None
    expected = (whole + 1).split(8, dim)[group.rank]
    torch.testing.assert_close(shard.grad.to_local(), expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_are_exchanged_and_so_are_their_gradients(pool, dim) -> None:
    pool(4)(completed, dim)
