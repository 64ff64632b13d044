"""Where targets are, and how many count."""

from __future__ import annotations

import pytest
import torch

import fabric_tp
from fabric_tp.autograd.collectives import Group
from fabric_tp.loss.targets import Vocabulary
from fabric_tp.testing.ranks import mesh


def test_a_target_is_a_column_of_one_rank() -> None:
    targets = torch.tensor([0, 7, 8, 23, -100, 5])
    shards = [Vocabulary(24, Group("", 3, rank)) for rank in range(3)]
    columns, elsewhere = zip(*(shard.locate(targets) for shard in shards), strict=True)
    here = ~torch.stack(elsewhere)
    assert here.sum(0).tolist() == [1, 1, 1, 1, 0, 1]
    whole = torch.stack(columns) + torch.tensor([[0], [8], [16]])
    assert (whole[here] == targets.expand(3, -1)[here]).all()
    assert (torch.stack(columns)[~here] == 0).all()  # what is elsewhere must still be a column


def test_the_last_rank_has_what_is_left() -> None:
    shards = [Vocabulary(10, Group("", 3, rank)) for rank in range(3)]
    assert [[shard.columns(rank) for rank in range(3)] for shard in shards] == [[4, 4, 2]] * 3
    targets = torch.arange(-1, 11)
    columns, elsewhere = zip(*(shard.locate(targets) for shard in shards), strict=True)
    here = ~torch.stack(elsewhere)
    assert here.sum(0).tolist() == [0, *[1] * 10, 0]
    whole = torch.stack(columns) + torch.tensor([[0], [4], [8]])
    assert (whole[here] == targets.expand(3, -1)[here]).all()


def count(sizes: tuple[int, int], ignored: list[int], **options: int) -> float:
    """Of two micro-batches with 12 targets in all, of which each data-parallel rank ignores as many as this says."""
    targets = torch.arange(12)
    targets[: ignored[mesh(*sizes).get_local_rank("data_parallel")]] = options.get("ignore_index", -100)
    both = [targets.view(3, 4)[:1], targets.view(3, 4)[1:]]
    found = [fabric_tp.count_targets(each, mesh(*sizes), **options) for each in (targets, iter(both))]
    assert found[0] == found[1]
    assert found[0].shape == ()
    return float(found[0])


@pytest.mark.parametrize(("ignored", "expected"), [([0, 0], 12), ([2, 7], 7.5), ([12, 3], 4.5), ([12, 12], 1)])
def test_count_is_the_mean_over_data_parallel_ranks(pool, ignored, expected) -> None:
    assert pool(2)(count, (2, 1), ignored) == expected


def test_tensor_parallel_ranks_have_the_same_targets(pool) -> None:
    assert pool(2)(count, (1, 2), [5]) == 7


def test_count_with_another_ignore_index(pool) -> None:
    """11 is one of the targets."""
    assert pool(2)(count, (1, 2), [3], ignore_index=11) == 8


def test_count_on_a_tensor_parallel_mesh_only(pool) -> None:
    assert pool(2)(count_on_one_dimension) == 3


def count_on_one_dimension() -> float:
    return float(fabric_tp.count_targets(torch.tensor([1, 2, -100, 3]), mesh(1, 2)["tensor_parallel"]))
