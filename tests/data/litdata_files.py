"""litdata's streaming dataloaders, or, where it is not installed, what they do with ranks and workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tests.data.fabric import forked_workers

try:
    import litdata
except ImportError:
    litdata = None


def sample(number: int) -> Tensor:
    return torch.tensor([float(number)])


def write(path: Path, size: int) -> None:
    """Samples ``[0]`` to ``[size - 1]``."""
    if litdata is not None:
        litdata.optimize(sample, list(range(size)), str(path), chunk_size=4, num_workers=1, start_method="spawn")


def dataloader(path: Path, batch_size: int, num_workers: int = 0) -> DataLoader:
    workers = forked_workers(num_workers)
    if litdata is None:
        return DataLoader(_StreamingDataset(range(64)), batch_size, **workers)
    return litdata.StreamingDataLoader(_dataset(path), batch_size=batch_size, **workers)


def combined_dataloader(path: Path, batch_size: int) -> DataLoader:
    if litdata is None:
        parts = [_StreamingDataset(range(32)), _StreamingDataset(range(32, 64))]
        return DataLoader(_CombinedStreamingDataset(parts), batch_size)
    dataset = litdata.CombinedStreamingDataset([_dataset(path), _dataset(path)], seed=3, iterate_over_all=True)
    return litdata.StreamingDataLoader(dataset, batch_size=batch_size)


def _dataset(path: Path) -> IterableDataset:
    os.environ.pop("GLOBAL_RANK", None)
    return litdata.StreamingDataset(str(path), shuffle=True, seed=5, drop_last=True)


@dataclass
class _Environment:
    world_size: int
    global_rank: int
    num_nodes: int


class _StreamingDataset(IterableDataset):
    def __init__(self, numbers: range) -> None:
        self.numbers = numbers
        self.distributed_env = _Environment(dist.get_world_size(), dist.get_rank(), 1)

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        first = self.distributed_env.global_rank * workers + index
        return map(sample, self.numbers[first :: self.distributed_env.world_size * workers])


class _CombinedStreamingDataset(IterableDataset):
    def __init__(self, datasets: list[_StreamingDataset]) -> None:
        self._datasets = datasets

    def __iter__(self) -> Iterator[Tensor]:
        return chain(*self._datasets)


_StreamingDataset.__module__ = _CombinedStreamingDataset.__module__ = "litdata.streaming.dataset"
