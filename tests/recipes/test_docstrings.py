import json
from pathlib import Path

import pytest
import torch
from data import train_tokenizer
from docstrings import Docstrings, samples_of
from litgpt import Tokenizer

SOURCE = '''
def area(width: float, height: float = 1.0) -> float:
    """The area of
    a rectangle.

    More about it.
    """

def _hidden(): "Not public."

def silent(x): return x

class Shape:
    def move(self, *, by): "Move it."
    def _draw(self): "Draw it."

class _Private:
    def public(self): "In a private class."
'''


def write_files(folder: Path, number: int = 10) -> Path:
    folder.mkdir()
    for i in range(number):
        (folder / f"{i}.py").write_text(SOURCE.replace("area", f"area_{i}"))
    return folder


def test_instructions_and_answers(tmp_path: Path) -> None:
    (tmp_path / "shapes.py").write_text(SOURCE)
    assert list(samples_of(tmp_path / "shapes.py")) == [
        {"instruction": "The area of a rectangle.", "output": "def area(width: float, height: float=1.0) -> float:"},
        {"instruction": "Move it.", "output": "def move(self, *, by):"},
    ]


@pytest.mark.parametrize("content", [b"print 'old'", b"\0", b"\xff\xfe"])
def test_what_is_no_python_of_this_version_is_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "old.py").write_bytes(content)
    assert list(samples_of(tmp_path / "old.py")) == []


@pytest.fixture
def data(tmp_path: Path) -> Docstrings:
    folder = write_files(tmp_path / "code")
    train_tokenizer(sorted(folder.iterdir()), tmp_path, 300, 10**6)
    data = Docstrings(path=folder, val_fraction=0.3, cache_dir=tmp_path / "cache")
    data.connect(Tokenizer(tmp_path), batch_size=2, max_seq_length=1024)
    data.prepare_data()
    data.setup()
    return data


def test_answers_alone_are_targets(data: Docstrings) -> None:
    assert data.tokenizer is not None
    sample = data.train_dataset[0]
    text = data.tokenizer.decode(sample["input_ids"])
    assert text.startswith("Below is an instruction")
    targets = sample["labels"][sample["labels"] != -100]
    assert targets[-1] == data.tokenizer.eos_id
    assert data.tokenizer.decode(targets[:-1]) == data.train_dataset.data[0]["output"]
    data.mask_prompt = False
    data.setup()
    assert torch.equal(data.train_dataset[0]["labels"], sample["input_ids"])


def test_no_function_is_in_training_and_validation(data: Docstrings) -> None:
    found = json.loads(data.cached.read_text())
    areas = [{each["output"] for each in found[split] if "area" in each["output"]} for split in ("train", "val")]
    assert areas[0].isdisjoint(areas[1])
    assert len(areas[0]) + len(areas[1]) == 10
    assert len(data.val_dataset) >= 2


def test_second_run_reads_the_cache(data: Docstrings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("docstrings.samples_of", lambda _: pytest.fail("read again"))
    data.prepare_data()
    assert [path.name for path in data.cached.parent.iterdir()] == [data.cached.name]
