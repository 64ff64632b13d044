from pathlib import Path

import pytest
import torch
from data import TextFiles, train_tokenizer
from litgpt import Tokenizer
from litgpt.data import JSON, SFTDataset, get_sft_collate_fn
from litgpt.prompts import Default
from packing import Packed, PackedSamples, fill_rows


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3, 4, 5], [[0, 1], [2]]),
        ([3, 4, 3], [[0, 1, 2]]),
        ([10, 10], [[0], [1]]),
        ([], []),
    ],
)
def test_rows_are_filled_in_order(lengths: list[int], expected: list[list[int]]) -> None:
    assert fill_rows(lengths, 10) == expected


def samples(tmp_path: Path, mask_prompt: bool) -> SFTDataset:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five " * 50)
    train_tokenizer([text], tmp_path, 280, 10**6)
    data = [{"instruction": "one two", "output": word} for word in ("three", "four", "five five")]
    return SFTDataset(data, Tokenizer(tmp_path), Default(), max_seq_length=64, mask_prompt=mask_prompt)


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_targets_are_those_of_the_samples(tmp_path: Path, mask_prompt: bool) -> None:
    """Each follows what it follows where its sample is alone."""
    alone = samples(tmp_path, mask_prompt)
    packed = PackedSamples(alone, 64)
    assert len(packed) == 1
    batch = get_sft_collate_fn(max_seq_length=64)([packed[0]])

    def pairs(inputs: torch.Tensor, labels: torch.Tensor) -> list[tuple[int, int]]:
        shifted = zip(inputs[:-1].tolist(), labels[1:].tolist(), strict=True)
        return [(before, target) for before, target in shifted if target != -100]

    expected = [pair for each in (alone[i] for i in range(3)) for pair in pairs(each["input_ids"], each["labels"])]
    assert pairs(batch["input_ids"][0], batch["labels"][0]) == expected


def test_text_is_not_packed(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some text " * 200)
    data = Packed(TextFiles(path=tmp_path, cache_dir=tmp_path / "cache", vocab_size=270))
    data.connect(batch_size=1, max_seq_length=16)
    data.prepare_data()
    data.setup()
    with pytest.raises(ValueError, match="--packing true is for instruction data, and TextFiles has samples of Token"):
        data.train_dataloader()


def test_prompt_style_is_that_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[]")
    assert type(Packed(JSON(tmp_path / "data.json", val_split_fraction=0.5)).prompt_style).__name__ == "Alpaca"
