"""Text files as training data.

The text is tokenized once and cached; files, not samples, are split into training and validation, so no file is seen
by both.
"""

import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPETokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

END_OF_TEXT = "<|endoftext|>"
NOT_LIBRARY_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
CACHE_FORMAT = 1  # part of the cache's key: raise it when what is written there changes


@dataclass
class TextFiles(DataModule):
    """Fixed-length samples from the text files of a folder; by default from Python's own standard library."""

    path: Path | None = None
    """The folder with the text files, searched with its sub-folders. By default the source files of this Python's
    standard library, without its tests: about 12 MB of text that is on every machine."""
    pattern: str | None = None
    """Which files to read, for example '*.md'. By default '*.txt', and '*.py' for the standard library."""
    val_fraction: float = 0.05
    """The share of the text that is kept for validation, in whole files."""
    vocab_size: int = 1024
    """How many tokens the byte-level BPE has that is trained on the text. Ignored if a tokenizer is given."""
    tokenizer_megabytes: float = 4.0
    """Train that BPE on at most this much of the training text, which takes a second rather than minutes."""
    cache_dir: Path | None = None
    """Where tokenizers and tokens are kept for the next run. By default ~/.cache/fabric_tp (or $XDG_CACHE_HOME)."""
    num_workers: int = 0
    """How many processes load data. Reading a sample costs microseconds, so none is needed."""
    random_offset: bool = False
    """Begin each training sample a random number of tokens later, so that epochs cut the text differently."""

    tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    tokenizer_dir: Path | None = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__init__()

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        """Raises ValueError if there is nothing to read: before processes start, so that none waits for another."""
        self.tokenizer, self.batch_size, self.max_seq_length = tokenizer, batch_size, max_seq_length or 256
        self.folder = self.path or Path(sysconfig.get_path("stdlib"))
        self.val_files, self.train_files = split_files(self.find_files(), self.folder, self.val_fraction)
        self.cached = (self.cache_dir or default_cache_dir()) / self.cache_key()

    def prepare_data(self) -> None:
        """Train the tokenizer and tokenize the text, unless a run with the same files and options already has."""
        if self.cached.is_dir():
            return
        self.cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=self.cached.parent, prefix=".unfinished-"))
        try:
            if self.tokenizer is None:
                train_tokenizer(self.train_files, unfinished, self.vocab_size, int(self.tokenizer_megabytes * 1e6))
            tokenizer = self.tokenizer or Tokenizer(unfinished)
            np.save(unfinished / "train.npy", tokenize(self.train_files, tokenizer))
            np.save(unfinished / "val.npy", tokenize(self.val_files, tokenizer))
            unfinished.chmod(0o755)  # mkdtemp's directories are closed to others
            unfinished.rename(self.cached)  # atomic: nobody ever sees half a cache
        except OSError:
            if not self.cached.is_dir():  # otherwise another run was quicker and wrote the same
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def setup(self, stage: str = "") -> None:
        if self.tokenizer is None:
            self.tokenizer, self.tokenizer_dir = Tokenizer(self.cached), self.cached
        self.train_dataset = TokenBlocks(
            self.cached / "train.npy", self.max_seq_length, random_offset=self.random_offset
        )
        self.val_dataset = TokenBlocks(self.cached / "val.npy", self.max_seq_length)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_dataset, self.batch_size, num_workers=self.num_workers)

    def find_files(self) -> list[Path]:
        if not self.folder.is_dir():
            raise ValueError(f"--data.path {str(self.folder)!r} is not a folder. Give a folder with text files.")
        pattern = self.pattern or ("*.txt" if self.path else "*.py")
        below = [file for file in self.folder.rglob("*") if file.is_file()]
        files = [file for file in below if file.match(pattern) and file.stat().st_size > 0]
        if self.path is None:
            files = [file for file in files if NOT_LIBRARY_CODE.isdisjoint(file.relative_to(self.folder).parts)]
        if len(files) < 2:
            suffixes = Counter(file.suffix for file in below).most_common(3)
            found = ", ".join(f"{count} '*{suffix}'" for suffix, count in suffixes) or "nothing"
            raise ValueError(
                f"Found {len(files)} non-empty files {pattern!r} in {str(self.folder)!r}, but at least 2 are needed:"
                f" one to train on and one to validate on. The folder holds {found}."
                " Choose other files with --data.pattern or another folder with --data.path."
            )
        return files

    def cache_key(self) -> str:
        """Changes with any file and any option that the cached tokens depend on."""
        key = hashlib.sha256(repr((CACHE_FORMAT, self.val_fraction)).encode())
        if self.tokenizer is None:
            key.update(repr((self.vocab_size, self.tokenizer_megabytes)).encode())
        elif self.tokenizer.backend == "huggingface":
            key.update(self.tokenizer.processor.to_str().encode())
        else:
            key.update(self.tokenizer.processor.serialized_model_proto())
        for file in (*self.val_files, *self.train_files):
            status = file.stat()
            key.update(repr((file.relative_to(self.folder).as_posix(), status.st_size, status.st_mtime_ns)).encode())
        return key.hexdigest()[:16]


class TokenBlocks(Dataset):
    """Sample `i` is `tokens[i * T : (i + 1) * T + 1]`: T inputs and, shifted by one, their T targets.

    With `random_offset` it begins up to T - 1 tokens later, by torch's random state.
    """

    def __init__(self, file: Path, max_seq_length: int, *, random_offset: bool = False) -> None:
        self.file, self.max_seq_length, self.random_offset = file, max_seq_length, random_offset

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.load(self.file, mmap_mode="r")

    def __getstate__(self) -> dict[str, object]:
        """For worker processes, which open the file themselves."""
        return {name: value for name, value in vars(self).items() if name != "tokens"}

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.max_seq_length - self.random_offset)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.max_seq_length
        if self.random_offset:
            start += int(torch.randint(self.max_seq_length, ()))
        return torch.from_numpy(self.tokens[start : start + self.max_seq_length + 1].astype(np.int64))


def split_files(files: list[Path], folder: Path, val_fraction: float) -> tuple[list[Path], list[Path]]:
    """Split into validation and training files, by a hash of their names: the file system's order does not matter.

    A file that alone is larger than the share for validation is trained on.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"--data.val_fraction {val_fraction} must lie between 0 and 1, for example 0.05.")
    files = sorted(files, key=lambda file: hashlib.sha256(file.relative_to(folder).as_posix().encode()).digest())
    rest = val_fraction * sum(file.stat().st_size for file in files)
    val_files = []
    for file in files:
        if file.stat().st_size <= rest:
            val_files.append(file)
            rest -= file.stat().st_size
    val_files = val_files or [min(files, key=lambda file: file.stat().st_size)]
    return val_files, [file for file in files if file not in val_files]


def train_tokenizer(files: list[Path], directory: Path, vocab_size: int, max_bytes: int) -> None:
    """Train a byte-level BPE and write the files that `litgpt.Tokenizer(directory)` reads."""

    def text() -> Iterator[str]:
        size = 0
        for file in files:
            for piece in read_pieces(file):
                yield piece
                size += len(piece)
            if size >= max_bytes:
                return

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"--data.vocab_size {vocab_size} must be above {len(alphabet)}: every byte is a token.")
    tokenizer = BPETokenizer(models.BPE())
    # White space never joins a word, as it does in GPT-2's tokens: prompts that end with a space ("def ") then look
    # like the text that the model has seen.
    split = pre_tokenizers.Split(Regex(r"\s+|\w+|[^\w\s]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "add_bos_token": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def tokenize(files: list[Path], tokenizer: Tokenizer) -> np.ndarray:
    """All tokens of the files, with the end-of-text token, if there is one, after each file."""
    dtype = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32
    tokens = []
    for file in files:
        tokens += [tokenizer.encode(piece, bos=False).numpy().astype(dtype) for piece in read_pieces(file)]
        if tokenizer.eos_id is not None:
            tokens.append(np.array([tokenizer.eos_id], dtype))
    return np.concatenate(tokens)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """With added tokens, which `Tokenizer.vocab_size` leaves out."""
    return tokenizer.processor.get_vocab_size() if tokenizer.backend == "huggingface" else tokenizer.vocab_size


def read_pieces(file: Path) -> Iterator[str]:
    """Whole lines, about a megabyte at a time: a tokenizer needs a hundred times the memory of its text."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        while piece := lines.readlines(1 << 20):
            yield "".join(piece)


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fabric_tp"
