"""Training checkpoints of torch.distributed.checkpoint, as Fabric saves them, tensor by tensor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from fabric_tp.architectures.hub import grouped
from fabric_tp.checkpoint.parts import whole_tensors

PREFIX = "model."
"""What Fabric puts before a model's names, if the state that it saves calls the model so."""


class Distributed:
    """The model's tensors in a training checkpoint.

    Args:
        path: The checkpoint's directory.
        model: The model, parallelized, without memory.

    Raises:
        ValueError: It holds no such model.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        self._reader = FileSystemReader(path)
        saved = self._reader.read_metadata().state_dict_metadata
        self._parts: dict[str, list[str]] = {}
        self._dims: dict[str, int] = {}
        self.like: dict[str, Tensor] = {}
        """Shape and dtype of each tensor."""
        for name, whole in whole_tensors(model).items():
            own = [PREFIX + part.name for part in whole.parts]
            self._parts[name] = [PREFIX + name] if PREFIX + name in saved else own
            self._dims[name] = whole.parts[0].dim
            for part in self._parts[name]:
                if not isinstance(saved.get(part), TensorStorageMetadata):
                    raise ValueError(
                        f"{str(path)!r} is a training checkpoint without {part!r}. Is it of another model, or not saved"
                        " by fabric.save(path, {'model': model, ...})?"
                    )
            dtype = saved[self._parts[name][0]].properties.dtype  # type: ignore[union-attr]
            self.like[name] = torch.empty(whole.shape, dtype=dtype, device="meta")
        self._sizes = {name: saved[name].size for parts in self._parts.values() for name in parts}  # type: ignore[union-attr]
        self._groups = {name: group for group in grouped(self._parts) for name in group}
        self._read: dict[str, Tensor] = {}

    def fetch(self, name: str) -> Tensor:
        """One tensor; what belongs to the same block is read with it, and kept until another block is asked for."""
        if name not in self._read:
            group = self._groups[name]
            state = {
                part: torch.empty(self._sizes[part], dtype=self.like[each].dtype)
                for each in group
                for part in self._parts[each]
            }
            with _alone():
                dcp.load(state, storage_reader=self._reader, no_dist=True)
            self._read = {
                each: _joined([state[part] for part in self._parts[each]], self._dims[each]) for each in group
            }
        return self._read[name]


def save_distributed(path: Path, model: nn.Module, like: Mapping[str, Tensor], fetch: Callable[[str], Tensor]) -> None:
    """Write a training checkpoint's model without ever holding it: each tensor is fetched when it is written.

    Args:
        path: A directory.
        model: The model, parallelized, without memory.
        like: Shape and dtype of each tensor, by the name that it had before.
        fetch: Gives it.
    """
    state: dict[str, Tensor] = {}
    makes: dict[str, Callable[[], Tensor]] = {}
    for name, whole in whole_tensors(model).items():
        for part in whole.parts:
            own = PREFIX + part.name
            state[own] = torch.empty(part.tensor.shape, dtype=like[name].dtype, device="meta")
            length = part.tensor.shape[part.dim] if part.tensor.dim() else 0

            def make(name: str = name, dim: int = part.dim, start: int = part.start, length: int = length) -> Tensor:
                whole = fetch(name)
                return (whole.narrow(dim, start, length) if whole.dim() else whole).clone()

            makes[own] = make
    with _alone():
        dcp.save(state, storage_writer=FileSystemWriter(path), planner=_Lazy(makes), no_dist=True)
    torch.save({}, path / "meta.pt")  # by which Fabric knows a distributed checkpoint


class _Lazy(DefaultSavePlanner):
    """Finds out a tensor's values when they are to be written."""

    def __init__(self, makes: Mapping[str, Callable[[], Tensor]]) -> None:
        super().__init__()
        self._makes = makes

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._makes[write_item.index.fqn]()


@contextmanager
def _alone() -> Iterator[None]:
    """One process does it, and need not be told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")
        yield


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
