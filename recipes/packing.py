"""Several short samples in one row, so that fewer of its tokens are padding."""

from typing import Any

import torch
from batches import IGNORE
from litgpt import PromptStyle, Tokenizer
from litgpt.data import DataModule, SFTDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Packed(DataModule):
    """Instruction data whose samples are rows of `max_seq_length` tokens at most, each of as many samples as fit.

    A token sees the samples before its own in the row, and positions count on.
    """

    def __init__(self, data: DataModule) -> None:
        super().__init__()
        self.data, self.max_seq_length = data, -1

    @property
    def prompt_style(self) -> str | PromptStyle:
        return self.data.prompt_style  # type: ignore[attr-defined]

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any
    ) -> None:
        assert max_seq_length is not None
        self.max_seq_length = max_seq_length
        self.data.connect(tokenizer=tokenizer, batch_size=batch_size, max_seq_length=max_seq_length)

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str = "") -> None:
        self.data.setup(stage)

    def train_dataloader(self) -> DataLoader:
        return self.packed(self.data.train_dataloader())

    def val_dataloader(self) -> DataLoader:
        return self.packed(self.data.val_dataloader())

    def packed(self, loader: DataLoader) -> DataLoader:
        if not isinstance(loader.dataset, SFTDataset):
            raise ValueError(
                f"--packing true is for instruction data, and {type(self.data).__name__} has samples of"
                f" {type(loader.dataset).__name__}. Leave it out."
            )
        rows = PackedSamples(loader.dataset, self.max_seq_length)
        return DataLoader(rows, loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers)


class PackedSamples(Dataset):
    """Rows of samples as `litgpt.data.SFTDataset` makes them, taken in their order."""

    def __init__(self, samples: SFTDataset, max_seq_length: int) -> None:
        self.samples = samples
        self.rows = fill_rows([len(samples[i]["input_ids"]) for i in range(len(samples))], max_seq_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        samples = [self.samples[i] for i in self.rows[index]]
        counts = [sample["token_counts"] for sample in samples]
        return {
            "input_ids": torch.cat([sample["input_ids"] for sample in samples]),
            "labels": torch.cat([without_first(sample["labels"]) for sample in samples]),
            "token_counts": {name: sum(count[name] for count in counts) for name in counts[0]},
        }


def without_first(labels: Tensor) -> Tensor:
    """The first token of a sample follows nothing of its own: it is no target, as where the sample is alone."""
    labels = labels.clone()
    labels[:1] = IGNORE
    return labels


def fill_rows(lengths: list[int], max_seq_length: int) -> list[list[int]]:
    """The samples of each row, where the next sample that does not fit begins another."""
    rows: list[list[int]] = []
    room = 0
    for sample, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = max_seq_length
        rows[-1].append(sample)
        room -= length
    return rows
