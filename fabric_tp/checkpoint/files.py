"""Tensors in files, of which any part can be read without the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

SAFETENSORS_INDEX = "model.safetensors.index.json"
INDICES = (SAFETENSORS_INDEX, "pytorch_model.bin.index.json")
LITGPT = "lit_model.pth"


class Files(AbstractContextManager["Files"]):
    """The tensors of a checkpoint: those of a hub directory, with an index or without, or of one file.

    Args:
        path: A directory with ``*.safetensors`` or ``pytorch_model*.bin``, or one such file, or a ``lit_model.pth``.

    Raises:
        ValueError: There is nothing to read; or an index names a file that is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._open = ExitStack()
        self._safe: dict[str, safe_open] = {}
        self._mapped: dict[str, Tensor] = {}
        for file in _files(self.path):
            self._add(file)

    def _add(self, file: Path) -> None:
        if file.suffix == ".safetensors":
            opened = self._open.enter_context(safe_open(file, framework="pt"))
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                part = opened.get_slice(name)
                self._safe[name] = opened
                self.shapes[name] = torch.Size(part.get_shape())
                self.dtypes[name] = opened.get_slice(name)[:0].dtype if self.shapes[name] else torch.float32
            return
        state = torch.load(file, mmap=True, map_location="cpu", weights_only=True)
        for name, tensor in state.get("model", state).items():
            self._mapped[name] = tensor
            self.shapes[name], self.dtypes[name] = tensor.shape, tensor.dtype

    def like(self) -> dict[str, Tensor]:
        """Shape and dtype of each tensor."""
        return {name: torch.empty(shape, dtype=self.dtypes[name], device="meta") for name, shape in self.shapes.items()}

    def read(self, name: str, where: tuple[slice | int, ...]) -> Tensor:
        """A part of a tensor, or all of it for ``()``; only this part is brought into memory."""
        if name in self._safe:
            opened = self._safe[name]
            return opened.get_slice(name)[where] if where else opened.get_tensor(name)
        return self._mapped[name][where]

    def __exit__(self, *error: object) -> None:
        self._open.close()
        self._mapped.clear()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for index in INDICES:
        if (path / index).is_file():
            names = set(json.loads((path / index).read_text())["weight_map"].values())
            if missing := sorted(name for name in names if not (path / name).is_file()):
                raise ValueError(
                    f"{str(path / index)!r} names {missing[:3]}, which are not there. Download them again."
                )
            return sorted(path / name for name in names)
    found = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    found = found or sorted(path.glob("pytorch_model*.bin"))
    if not found and (path / LITGPT).is_file():
        found = [path / LITGPT]
    if not found:
        raise ValueError(
            f"{str(path)!r} holds no checkpoint: neither model.safetensors, nor an index of several such files, nor"
            f" pytorch_model.bin, nor {LITGPT}."
        )
    return found


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Which file has which tensor, as Transformers writes it."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
