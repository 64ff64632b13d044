import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from data import TextFiles
from litgpt import Tokenizer


def write_files(folder: Path, count: int = 20) -> None:
    words = random.Random(0).choices(["def", "return", "self", "for", "naïve", "while", "x = 1\n", "(a, b)\n"], k=20000)
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.txt").write_text(" ".join(words[i * 1000 : (i + 1) * 1000]), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path / "text")
    return tmp_path / "text"


def text_files(folder: Path, **options: object) -> TextFiles:
    data = TextFiles(path=folder, cache_dir=folder.parent / "cache", vocab_size=270, **options)  # type: ignore[arg-type]
    data.connect(batch_size=2, max_seq_length=32)
    return data


def prepared(folder: Path, **options: object) -> TextFiles:
    data = text_files(folder, **options)
    data.prepare_data()
    data.setup()
    return data


def test_default_is_the_standard_library_without_tests() -> None:
    data = TextFiles()
    data.connect(max_seq_length=32)
    names = [file.relative_to(data.folder).as_posix() for file in (*data.train_files, *data.val_files)]
    assert "json/decoder.py" in names
    assert len(names) > 200
    assert not any(part in ("site-packages", "test", "tests") for name in names for part in name.split("/"))


def test_no_file_is_in_training_and_validation(folder: Path) -> None:
    data = text_files(folder, val_fraction=0.2)
    assert set(data.train_files).isdisjoint(data.val_files)
    assert len(data.train_files) + len(data.val_files) == 20
    assert 1 <= len(data.val_files) <= 5


def test_split_does_not_depend_on_the_order_of_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = text_files(folder)
    listing = Path.rglob

    def reversed_listing(self: Path, pattern: str) -> Iterator[Path]:
        return reversed(list(listing(self, pattern)))

    monkeypatch.setattr(Path, "rglob", reversed_listing)
    after = text_files(folder)
    assert before.val_files == after.val_files
    assert before.cached == after.cached


def test_a_file_above_the_share_of_validation_is_trained_on(folder: Path) -> None:
    big = folder / "big.txt"
    big.write_text("word " * 100_000)
    for fraction in (0.05, 0.2):
        assert big in text_files(folder, val_fraction=fraction).train_files


@pytest.mark.parametrize(
    ("files", "pattern", "match"),
    [
        ([], None, r"Found 0 non-empty files '\*.txt' .* The folder holds nothing"),
        (["a.md", "b.md"], None, r"Found 0 non-empty files '\*.txt' .* The folder holds 2 '\*.md'"),
        (["a.txt"], None, r"Found 1 non-empty files .* at least 2 are needed"),
        (["a.txt", "b.txt"], "*.rst", r"Found 0 non-empty files '\*.rst'"),
    ],
)
def test_too_few_files(tmp_path: Path, files: list[str], pattern: str | None, match: str) -> None:
    for name in files:
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=match):
        TextFiles(path=tmp_path, pattern=pattern).connect(max_seq_length=32)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        TextFiles(path=tmp_path / "missing").connect(max_seq_length=32)


def test_vocabulary_must_hold_all_bytes(folder: Path) -> None:
    data = TextFiles(path=folder, cache_dir=folder.parent / "cache", vocab_size=256)
    data.connect(max_seq_length=32)
    with pytest.raises(ValueError, match="must be above 256"):
        data.prepare_data()
    assert not list((folder.parent / "cache").iterdir())


def test_samples_are_the_files_tokens(folder: Path) -> None:
    data = prepared(folder)
    assert data.tokenizer is not None
    first = data.train_dataset[0]
    assert first.shape == (33,)
    assert first.dtype == torch.int64
    assert data.train_dataset[1][0] == first[-1]  # the last target is the next sample's first input
    text = data.tokenizer.decode(first)
    assert data.train_files[0].read_text(encoding="utf-8").startswith(text)
    assert len(data.train_dataset) == (len(data.train_dataset.tokens) - 1) // 32


def test_tokenizer_loads_as_litgpts(folder: Path) -> None:
    data = prepared(folder)
    tokenizer = Tokenizer(data.cached)
    assert tokenizer.vocab_size == 270
    assert tokenizer.eos_id == tokenizer.token_to_id("<|endoftext|>")
    for text in ("def f(x):\n    return naïve 🦙\n", " leading and trailing "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_file_ends_with_the_end_of_text_token(folder: Path) -> None:
    data = prepared(folder)
    assert data.tokenizer is not None
    assert (data.train_dataset.tokens == data.tokenizer.eos_id).sum() == len(data.train_files)


def test_second_run_reads_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(folder)
    monkeypatch.setattr("data.tokenize", lambda *_: pytest.fail("tokenized again"))
    second = prepared(folder)
    assert torch.equal(first.train_dataset[3], second.train_dataset[3])
    assert [path.name for path in (folder.parent / "cache").iterdir()] == [first.cached.name]


@pytest.mark.parametrize("change", ["file", "new file", "vocab_size", "val_fraction", "tokenizer"])
def test_cache_is_not_used_for_anything_else(folder: Path, change: str) -> None:
    data = prepared(folder)
    before = data.cached
    if change == "file":
        (folder / "0.txt").write_text("something else")
    elif change == "new file":
        (folder / "new.txt").write_text("something else")
    elif change == "vocab_size":
        data.vocab_size = 271
    elif change == "val_fraction":
        data.val_fraction = 0.1
    data.connect(tokenizer=Tokenizer(before) if change == "tokenizer" else None, batch_size=2, max_seq_length=32)
    assert data.cached != before


def test_interrupted_preparation_leaves_no_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    data = text_files(folder)
    with monkeypatch.context() as patch:
        patch.setattr("data.tokenize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data()
    assert not data.cached.exists()
    data.prepare_data()
    data.setup()
    assert len(data.train_dataset) > 0


def test_given_tokenizer_is_used(folder: Path) -> None:
    own = prepared(folder)
    data = TextFiles(path=folder, cache_dir=folder.parent / "cache")
    data.connect(tokenizer=Tokenizer(own.cached), batch_size=2, max_seq_length=32)
    data.prepare_data()
    data.setup()
    assert torch.equal(data.train_dataset[0], own.train_dataset[0])
    assert not (data.cached / "tokenizer.json").exists()
