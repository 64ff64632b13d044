"""Batches that one rank loads for others."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fabric_tp.data.broadcast import _pack, _unpack
from fabric_tp.data.verify import fingerprint
from tests.data.fabric import Mean, forked_workers, gather, on_ranks
from tests.data.stand_ins import ResumableDataLoader

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    tokens: Tensor
    name: str


ONES = torch.arange(6.0).view(2, 3)
BATCHES = [
    ONES,
    ONES.T,
    ONES.bfloat16(),
    ONES > 2,
    torch.tensor(3),
    torch.empty(0, 4, dtype=torch.int8),
    torch.ones(3, dtype=torch.complex64),
    {"tokens": ONES.long(), "more": [ONES, (ONES, None)], 3: "text"},
    OrderedDict(a=1, b=2.5, c=True, d=b"bytes"),
    Pair(ONES, [1, "two"]),
    Sample(ONES, "name"),
    np.arange(4),
    torch.ones(2, 2).to_sparse(),
    [],
    None,
]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_batch_arrives_as_it_was(batch) -> None:
    received = _unpack(*_pack(batch))
    assert type(received) is type(batch)
    assert fingerprint(received) == fingerprint(batch)
    if isinstance(batch, Tensor):
        assert (received.dtype, received.shape, received.layout) == (batch.dtype, batch.shape, batch.layout)
    if isinstance(batch, Sample):
        assert [field.name for field in fields(received)] == ["tokens", "name"]


def test_a_tensor_that_comes_twice_is_one_tensor() -> None:
    first, second = _unpack(*_pack([ONES, ONES]))
    assert first is not second or first.data_ptr() == second.data_ptr()
    assert first.data_ptr() == second.data_ptr()


class Counting(Dataset):
    def __init__(self, fails_at: int = -1) -> None:
        self.read, self.fails_at, self.rank = 0, fails_at, dist.get_rank()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.fails_at:
            raise KeyError("the file of sample 5")
        self.read += 1
        return {"x": torch.full((3,), index + 100 * self.rank), "name": f"sample {index}"}


def only_the_first_rank_reads(sizes: tuple[int, int]) -> list[tuple[int, int, list[Any]]]:
    with on_ranks(sizes, broadcast_inputs=True) as fabric:
        dataset = Counting()
        loader = fabric.setup_dataloaders(DataLoader(dataset, batch_size=2))
        batches = [(batch["x"].tolist(), batch["name"]) for batch in loader]
        return gather((dataset.read, len(loader), batches))


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)])
def test_data_is_read_once_per_group(pool, sizes) -> None:
    results = pool(sizes[0] * sizes[1])(only_the_first_rank_reads, sizes)
    size = 12 // sizes[0]
    assert [read for read, _, _ in results] == [size, 0] * sizes[0]
    for (_, length, first), (_, other_length, second) in zip(results[::2], results[1::2], strict=True):
        assert length == other_length == size // 2
        assert len(first) == length
        assert first == second


def leave_early(breaks_after: int) -> list[list[list[int]]]:
    with on_ranks((1, 2), broadcast_inputs=True) as fabric:
        model = fabric.setup(Mean())
        loader = fabric.setup_dataloaders(DataLoader(torch.arange(8), batch_size=2))  # type: ignore[arg-type]
        passes = []
        for _ in range(3):
            passes.append([])
            for batch in itertools.islice(loader, breaks_after):
                model(batch)
                dist.all_reduce(torch.ones(1))  # training's own collectives meanwhile
                passes[-1].extend(batch.tolist())
        return gather(passes)


@pytest.mark.parametrize("breaks_after", [0, 1, 2, 3, 4])
def test_passes_may_be_left_early(pool, breaks_after) -> None:
    for passes in pool(2)(leave_early, breaks_after):
        assert passes == [list(range(2 * breaks_after))] * 3


def fail(fails_at: int, num_workers: int) -> list[tuple[int, str]]:
    with on_ranks((1, 2), broadcast_inputs=True) as fabric:
        loader = fabric.setup_dataloaders(DataLoader(Counting(fails_at), batch_size=2, **forked_workers(num_workers)))
        count = 0
        try:
            for _ in loader:
                count += 1
        except (KeyError, RuntimeError) as error:
            return gather((count, f"{type(error).__name__}: {error}"))
        return gather((count, ""))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_failure_to_load_reaches_all_ranks_at_its_batch(pool, num_workers) -> None:
    (first_count, first), (second_count, second) = pool(2)(fail, 5, num_workers)
    assert first_count == second_count == 2
    assert first.startswith("KeyError")
    assert second.startswith("RuntimeError: Rank 0 failed to load")
    assert "the file of sample 5" in second


class Unsized(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(6 + dist.get_rank()))


def unknown_lengths() -> list[int]:
    with on_ranks((2, 2), broadcast_inputs=True) as fabric:
        loader = fabric.setup_dataloaders(DataLoader(Unsized(), batch_size=None))
        return gather([len(list(loader)) for _ in range(2)])


def test_all_groups_end_with_the_shortest(pool) -> None:
    assert pool(4)(unknown_lengths) == [[6, 6]] * 4


def resume() -> list[tuple[Any, list[int]]]:
    with on_ranks((1, 2), broadcast_inputs=True) as fabric:
        first, second = (ResumableDataLoader(torch.arange(8), batch_size=2) for _ in range(2))  # type: ignore[arg-type]
        first, second = fabric.setup_dataloaders(first, second)
        batches = iter(first)
        next(batches), next(batches)
        state = first.state_dict()
        second.load_state_dict({"batches": 2})
        return gather((state, torch.cat(list(second)).tolist()))


def test_state_is_that_of_the_batches_used(pool) -> None:
    """And not of those sent ahead; the ranks that do not load have none."""
    assert pool(2)(resume) == [({"batches": 2}, [4, 5, 6, 7]), ({}, [4, 5, 6, 7])]


def threads_after(passes: int) -> list[int]:
    with on_ranks((1, 2), broadcast_inputs=True) as fabric:
        loader = fabric.setup_dataloaders(DataLoader(torch.arange(8), batch_size=2))  # type: ignore[arg-type]
        broadcast = loader._dataloader._setup.broadcast
        for _ in range(passes):
            next(iter(loader))
        broadcast.close()
        return gather(sum(thread is broadcast._thread for thread in threading.enumerate()))


def test_thread_ends_when_closed(pool) -> None:
    assert pool(2)(threads_after, 2) == [0, 0]
