"""Instructions and answers without a network: what a function does, and its first line."""

import ast
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data import TextFiles
from litgpt.data import DataModule, SFTDataset, get_sft_collate_fn
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from torch.utils.data import DataLoader

FORMAT = 1  # part of the cache's name: raise it when what is written there changes
LONGEST = 300  # characters of a description or of a signature


@dataclass
class Docstrings(DataModule):
    """The public functions of Python files, by default of this Python's own standard library.

    The instruction is the first paragraph of a function's docstring, the answer the line that defines it. Files, not
    functions, are split into training and validation.
    """

    path: Path | None = None
    """The folder with the Python files, searched with its sub-folders. By default the standard library's, without its
    tests."""
    val_fraction: float = 0.1
    """The share of the text that is kept for validation, in whole files."""
    mask_prompt: bool = True
    """Whether only the answers are learned, and not the instructions."""
    prompt_style: str | PromptStyle = "alpaca"
    """The style to apply to instructions. See `litgpt.prompts` for the styles that there are."""
    cache_dir: Path | None = None
    """Where instructions and answers are kept for the next run. By default ~/.cache/fabric_tp (or $XDG_CACHE_HOME)."""
    num_workers: int = 0
    """How many processes load data."""

    tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__init__()
        if isinstance(self.prompt_style, str):
            self.prompt_style = PromptStyle.from_name(self.prompt_style)

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        """Raises ValueError if there is nothing to read: before processes start, so that none waits for another."""
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.max_seq_length = -1 if max_seq_length is None else max_seq_length
        pattern = None if self.path is None else "*.py"
        files = TextFiles(path=self.path, pattern=pattern, val_fraction=self.val_fraction, cache_dir=self.cache_dir)
        files.connect()
        self.files = {"train": files.train_files, "val": files.val_files}
        self.cached = files.cached.with_name(f"docstrings-{FORMAT}-{files.cached.name}.json")

    def prepare_data(self) -> None:
        """Read the files, unless a run with the same ones already has."""
        if self.cached.is_file():
            return
        found = {split: [each for file in files for each in samples_of(file)] for split, files in self.files.items()}
        self.cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.cached.with_name(f".{self.cached.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(found, indent=0), encoding="utf-8")
        unfinished.replace(self.cached)  # atomic: nobody ever sees half a cache

    def setup(self, stage: str = "") -> None:
        found = json.loads(self.cached.read_text(encoding="utf-8"))
        self.train_dataset, self.val_dataset = (self.dataset(found[split]) for split in ("train", "val"))

    def dataset(self, samples: list[dict[str, str]]) -> SFTDataset:
        assert self.tokenizer is not None
        return SFTDataset(
            samples, self.tokenizer, self.prompt_style, max_seq_length=self.max_seq_length, mask_prompt=self.mask_prompt
        )

    def train_dataloader(self) -> DataLoader:
        return self.dataloader(self.train_dataset, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.dataloader(self.val_dataset, shuffle=False)

    def dataloader(self, dataset: SFTDataset, *, shuffle: bool) -> DataLoader:
        collate = get_sft_collate_fn(max_seq_length=self.max_seq_length)
        return DataLoader(dataset, self.batch_size, shuffle=shuffle, num_workers=self.num_workers, collate_fn=collate)


def samples_of(file: Path) -> Iterator[dict[str, str]]:
    """What the public functions of a file, and those of its public classes, do; and how they are defined."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strings that a newer Python will refuse
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # of another version of Python, or no Python at all
        return
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in (node for body in (tree.body, *(each.body for each in classes)) for node in body):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            description = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            definition = f"def {node.name}({ast.unparse(node.args)}){returns}:"
            if description and max(len(description), len(definition)) <= LONGEST:
                yield {"instruction": description, "output": definition}
