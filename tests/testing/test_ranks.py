"""The pool's processes stay as they were, whatever functions have run on them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fabric_tp import _torch
from fabric_tp.testing.ranks import UNCOLLECTED_GROUPS, Ranks, mesh

FUNCTIONS = 12
GROUPS = 3


def process() -> int:
    return os.getpid()


def counts() -> tuple[int, int, int]:
    """The process, its threads and its process groups."""
    return os.getpid(), len(os.listdir("/proc/self/task")), len(_torch.process_groups())


def train_on_the_pools_mesh() -> list[float]:
    """DTensor finds the placements of these results in its cache when this runs again."""
    placed = DTensor.from_local(torch.ones(2) + dist.get_rank(), mesh(1, 2)["tensor_parallel"], [Shard(0)])
    return (placed * 2).full_tensor().tolist()


def make_groups() -> int:
    """As a Fabric does, with references in a circle."""
    groups = [init_device_mesh("cpu", (1, 2)).get_group(0), *[dist.new_group([0, 1]) for _ in range(GROUPS - 1)]]
    circle: list[object] = [groups]
    circle.append(circle)
    gc.collect(1)  # as old as what a Fabric holds; Python itself looks at it rarely
    for group in groups[1:]:
        dist.all_reduce(torch.ones(1), group=group)
    return len(_torch.process_groups())


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("on purpose")
    dist.barrier()


def leave() -> None:
    os._exit(3)


@pytest.fixture(scope="module")
def ranks(forks) -> Iterator[Ranks]:
    """A pool on which nothing else runs."""
    two = Ranks(2, forks)
    yield two
    two.stop()


def test_groups_and_their_threads_end_with_the_function(ranks) -> None:
    assert ranks(train_on_the_pools_mesh) == [2, 2, 4, 4]
    before = ranks(counts)
    during = [ranks(make_groups) for _ in range(FUNCTIONS)]
    assert set(during) == {before[2] + GROUPS}
    assert FUNCTIONS * GROUPS >= UNCOLLECTED_GROUPS
    after = ranks(counts)
    assert (after[0], after[2]) == (before[0], before[2])
    left = FUNCTIONS * GROUPS % UNCOLLECTED_GROUPS
    assert after[1] <= before[1] + 3 * left  # a loop and two workers for each group that waits for its collection
    assert ranks(train_on_the_pools_mesh) == [2, 2, 4, 4]


def test_a_function_that_fails_on_one_rank_starts_new_processes(ranks) -> None:
    before = ranks(process)
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed.*ValueError: on purpose"):
        ranks(fail_on, 1)
    assert ranks(process) != before
    assert ranks(train_on_the_pools_mesh) == [2, 2, 4, 4]


def test_a_rank_that_dies_is_named(ranks) -> None:
    with pytest.raises(AssertionError, match=r"rank [01] died, exit code 3"):
        ranks(leave)
    assert ranks(train_on_the_pools_mesh) == [2, 2, 4, 4]


def test_forks_are_told_apart(forks, ranks) -> None:
    """Two pools on the same origins, one of which ends before anybody has asked for the other's processes."""
    before = ranks(process)
    other = Ranks(2, forks)
    third = Ranks(1, forks)
    third.stop()
    assert {ranks(process), other(process)} > {before}
    with pytest.raises(AssertionError, match="rank 1 failed"):
        other(fail_on, 1)
    assert ranks(process) == before
    other.stop()
