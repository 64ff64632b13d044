"""A data module whose samples cannot be indexed, as litgpt's for pretraining."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from litgpt.data import DataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


class Samples(IterableDataset):
    """Remembers where it is, for a run that is resumed."""

    def __init__(self, number: int, length: int) -> None:
        self.number, self.length, self.next = number, length, 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.next < self.number:
            self.next += 1
            yield torch.arange(self.next, self.next + self.length + 1) % 500
        self.next = 0


class Loader(DataLoader):
    def state_dict(self) -> dict[str, Any]:
        return {"next": self.dataset.next}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.next = state["next"]  # type: ignore[attr-defined]


@dataclass
class Streamed(DataModule):
    samples: int = 40
    batch_size: int = field(init=False, repr=False, default=1)
    length: int = field(init=False, repr=False, default=1)

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        assert max_seq_length is not None
        self.batch_size, self.length = batch_size, max_seq_length

    def train_dataloader(self) -> DataLoader:
        return Loader(Samples(self.samples, self.length), self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Samples(self.samples, self.length), self.batch_size)
