"""Directories of the hub, written file by file, by several ranks at the same time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from fabric_tp.checkpoint.files import write_index
from fabric_tp.checkpoint.rows import Rows


class Sources:
    """What the tensors of the hub are made of.

    Args:
        rows: Numbers of the rows of these tensors.
        like: A tensor on the meta device for each: its shape and dtype.
        fetch: Gives one of them, whole. It may be a collective: all ranks ask for the same ones in the same order.
    """

    def __init__(self, rows: Rows, like: Mapping[str, Tensor], fetch: Callable[[str], Tensor]) -> None:
        self.rows, self.like, self.fetch = rows, like, fetch

    def names(self, numbers: Tensor) -> list[str]:
        return list(dict.fromkeys(run.name for run in self.rows.runs(numbers)))

    def empty(self, numbers: Tensor) -> Tensor:
        """The shape and dtype of the tensor whose rows have these numbers."""
        source = self.like[self.names(numbers)[0]]
        return source.new_empty((*numbers.shape, *source.shape[max(1, source.dim() - 1) :]))

    def assemble(self, numbers: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        if name := self.rows.whole(numbers):
            return held[name].contiguous()
        parts = [held[run.name][run.rows] for run in self.rows.runs(numbers)]
        return torch.cat(parts).view(self.empty(numbers).shape)


def write(directory: Path, hub: Mapping[str, Tensor], sources: Sources, max_shard_size: int | str) -> None:
    """Write the tensors of the hub, each given as the numbers of its rows; every rank writes whole files.

    Raises:
        RuntimeError: On all ranks, if one of them could not write.
    """
    split = split_torch_state_dict_into_shards(
        {name: sources.empty(numbers) for name, numbers in hub.items()}, max_shard_size=max_shard_size
    )
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = {file for i, file in enumerate(split.filename_to_tensors) if i % size == rank}
    writer = _Writer(directory, split, mine)
    uses = Counter(source for numbers in hub.values() for source in sources.names(numbers))
    needed = {
        source for file in mine for name in split.filename_to_tensors[file] for source in sources.names(hub[name])
    }
    held: dict[str, Tensor] = {}
    fetched: set[str] = set()
    for name, numbers in hub.items():
        for source in sources.names(numbers):
            if source not in fetched:
                fetched.add(source)
                whole = sources.fetch(source)
                if source in needed:
                    held[source] = whole.cpu()
        if split.tensor_to_filename[name] in mine:
            writer.add(name, sources.assemble(numbers, held))
        for source in sources.names(numbers):
            uses[source] -= 1
            if not uses[source]:
                held.pop(source, None)
    _raise_everywhere(writer.finish())
    if rank == 0 and split.is_sharded:
        write_index(directory, split.tensor_to_filename, split.metadata["total_size"])


class _Writer:
    """Writes each file when its tensors are there, while the next ones come."""

    def __init__(self, directory: Path, split: StateDictSplit, mine: set[str]) -> None:
        self._directory, self._split = directory, split
        self._missing = {file: set(split.filename_to_tensors[file]) for file in mine}
        self._tensors: dict[str, dict[str, Tensor]] = {file: {} for file in mine}
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._error: BaseException | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        file = self._split.tensor_to_filename[name]
        self._tensors[file][name] = tensor
        self._missing[file].discard(name)
        if not self._missing[file]:
            self._wait()
            path, tensors = self._directory / file, self._tensors.pop(file)
            self._running = self._thread.submit(save_file, tensors, path, {"format": "pt"})

    def finish(self) -> BaseException | None:
        self._wait()
        self._thread.shutdown()
        return self._error

    def _wait(self) -> None:
        """Others may wait for this rank in a collective, so an error is kept until all have come to an end."""
        if self._running and (error := self._running.exception()):
            self._error = error
        self._running = None


def _raise_everywhere(error: BaseException | None) -> None:
    messages = [f"{type(error).__name__}: {error}" if error else ""]
    if dist.is_initialized():
        messages = messages * dist.get_world_size()
        dist.all_gather_object(messages, messages[dist.get_rank()])
    if failed := [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message]:
        raise RuntimeError(f"Could not write the checkpoint. {'; '.join(failed)}") from error
