"""What libraries that are not installed here do with ranks, and a dataloader that can resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


class MosaicDataset(IterableDataset):
    """MosaicML's StreamingDataset: groups of ``replication`` ranks in a row get the same samples."""

    def __init__(self, size: int, replication: int | None = None) -> None:
        self.size, self.replication = size, replication

    def __iter__(self) -> Iterator[Tensor]:
        step = self.replication or 1
        ranks = range(dist.get_rank() // step, self.size, dist.get_world_size() // step)
        return (torch.tensor([float(number)]) for number in ranks)


MosaicDataset.__module__ = "streaming.base.dataset"


class ResumableDataLoader(DataLoader):
    """As torchdata's StatefulDataLoader: after load_state_dict() the next pass goes on behind so many batches."""

    _yielded = _skipped = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skipped, self._skipped = self._skipped, 0
        for self._yielded, batch in enumerate(super().__iter__(), start=1):
            if self._yielded > skipped:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batches": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skipped = state["batches"]
