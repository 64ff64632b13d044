"""Directories of the hub: ``model.safetensors``, or several such files with an index, and ``config.json``.

Of Transformers' models, and, by litgpt's own tables of names, of ``litgpt.GPT``: a download needs no conversion.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from fabric_tp.architectures.hub import HubNames, grouped, hub_names
from fabric_tp.checkpoint.atomic import replacing
from fabric_tp.checkpoint.files import SAFETENSORS_INDEX, Files
from fabric_tp.checkpoint.parts import (
    Whole,
    check_names,
    check_shape,
    is_adapters,
    wanted_of,
    whole_tensors,
    without_adapters,
)
from fabric_tp.checkpoint.rows import Rows
from fabric_tp.checkpoint.writing import Sources, write
from fabric_tp.wrapping import unwrapped

CONFIG = "config.json"
WEIGHTS = ("model*.safetensors", SAFETENSORS_INDEX, "pytorch_model*.bin", "pytorch_model.bin.index.json")
OTHER_FILES = (CONFIG, "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt")
"""What a directory has beside weights, for :func:`save` to copy."""


@torch.no_grad()
def load(model: nn.Module, directory: str | Path, *, progress: bool = True) -> None:
    """Read a directory of the hub into a parallelized model; each rank reads only what it keeps.

    Values take the dtype of the model. No communication, and no more memory than the model's own and one tensor's part.

    Args:
        model: A Transformers model or a ``litgpt.GPT``, parallelized, with or without Fabric around it.
        directory: Holds ``*.safetensors`` or ``pytorch_model*.bin``, with an index if there are several.
        progress: Show a bar on the first rank, if it takes longer than some seconds.

    Raises:
        ValueError: There is no checkpoint; it lacks a tensor, has one too many, or one of another shape.

    Example::

        with fabric.init_module(empty_init=True):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("checkpoints/Qwen3-8B"))
        model = fabric.setup(model)
        fabric_tp.checkpoint.huggingface.load(model, "checkpoints/Qwen3-8B")
    """
    names = hub_names(unwrapped(model))
    with Files(directory) as files:
        rows, found = numbered(files, names)
        wanted = wanted_of(model, found)
        found = {name: numbers for name, numbers in found.items() if name in wanted or not names.is_ignored(name)}
        missing = _untied(wanted, wanted.keys() - found.keys(), found.keys())
        check_names(directory, missing, found.keys() - wanted.keys())
        for name, whole in wanted.items():
            if name in found:
                check_shape(directory, name, _shape(found[name], rows, files), whole.shape)
        hidden = not (progress and _is_first())
        for name in tqdm(found, desc="Reading weights", unit=" tensors", disable=hidden, delay=3, leave=False):
            for part in wanted[name].parts:
                with part.filled() as local:
                    _fill(local, part.region, found[name], rows, files)


class Numbered(NamedTuple):
    """Which rows of a directory's tensors each tensor of the model is made of."""

    rows: Rows
    found: dict[str, Tensor]


def numbered(files: Files, names: HubNames) -> Numbered:
    rows, found = Rows(), dict[str, Tensor]()
    for group in grouped(files.shapes):
        found |= names.to_model({name: rows.number(name, files.shapes[name]) for name in group})
    if names.tied and names.tied[1] in found:
        found.setdefault(names.tied[0], found[names.tied[1]])
    return Numbered(rows, found)


def _untied(wanted: dict[str, Whole], missing: Iterable[str], found: Iterable[str]) -> set[str]:
    """Those that are missing and have no other name under which they are found."""
    there = {id(wanted[name].parts[0].tensor) for name in found if name in wanted}
    return {name for name in missing if id(wanted[name].parts[0].tensor) not in there}


def _shape(numbers: Tensor, rows: Rows, files: Files) -> torch.Size:
    run = next(rows.runs(numbers))
    source = files.shapes[run.name]
    return torch.Size((*numbers.shape, source[-1])) if len(source) > 1 else numbers.shape


def _fill(local: Tensor, region: tuple[slice, ...], numbers: Tensor, rows: Rows, files: Files) -> None:
    """Read what this rank has of a tensor, whose rows are those with these numbers."""
    if not local.numel():
        return
    if name := rows.whole(numbers):
        local.copy_(files.read(name, region))
        return
    lead = region[: numbers.dim()]
    columns = region[numbers.dim() :]
    flat = local.view(-1, *local.shape[numbers.dim() :])
    for run in rows.runs(numbers[lead]):
        flat[run.to : run.to + run.length].copy_(files.read(run.name, (*run.rows, *columns)))


@torch.no_grad()
def save(
    model: nn.Module, directory: str | Path, *, like: str | Path | None = None, max_shard_size: int | str = "5GB"
) -> None:
    """Write the model as a directory that ``from_pretrained`` reads; its files are written by all ranks side by side.

    All ranks must call it. A rank's memory holds, beside its model, two of the files and the tensors that the next ones
    are made of. The directory appears, or takes the place of an older one, when it is complete.

    Args:
        model: As for :func:`load`.
        directory: Where to; what else lies there stays.
        like: A directory of the same kind of model, whose config and tokenizer are copied. A Transformers model has a
            config of its own, and for a ``litgpt.GPT`` that is a Llama one is made.
        max_shard_size: Of a file: bytes, or text such as ``"5GB"``.

    Raises:
        ValueError: ``like`` is needed, or holds no ``config.json``.

    Example::

        fabric_tp.checkpoint.huggingface.save(model, "out/hub", like="checkpoints/Qwen3-8B")
    """
    directory, names, wholes = Path(directory), hub_names(unwrapped(model)), whole_tensors(model)
    if names.save_config is None and not (like and (Path(like) / CONFIG).is_file()):
        raise ValueError(
            f"like={like and str(like)!r} must be a directory with a {CONFIG}, such as that from which the model came:"
            f" a {type(unwrapped(model)).__name__} has no config of Transformers' to write, unless it is litgpt's and a"
            " Llama."
        )
    if any(map(is_adapters, wholes)):
        _check_merged(unwrapped(model), wholes)
        wholes = without_adapters(wholes)
    _leave_out_doubles(wholes)
    tied = names.tied is not None and _equal(*(wholes[name] for name in names.tied))
    if tied:
        del wholes[names.tied[0]]  # type: ignore[index]
    shapes = {name: torch.empty(whole.shape, dtype=whole.dtype, device="meta") for name, whole in wholes.items()}
    barrier = dist.barrier if dist.is_initialized() else _nothing
    with replacing(directory, moves=_is_first(), barrier=barrier, stale=WEIGHTS) as unfinished:
        if _is_first():
            unfinished.mkdir()
            write_config(names, unfinished, like, tied)
        barrier()
        write_weights(unfinished, names, shapes, lambda name: wholes[name].gather(), max_shard_size)


def write_weights(
    directory: Path,
    names: HubNames,
    like: Mapping[str, Tensor],
    fetch: Callable[[str], Tensor],
    max_shard_size: int | str,
) -> None:
    """Write the model's tensors by the names of the hub.

    Args:
        like: Shape and dtype of each.
        fetch: Gives one of them, as for :class:`fabric_tp.checkpoint.writing.Sources`.
    """
    rows, hub = Rows(), dict[str, Tensor]()
    for group in grouped(like):
        hub |= names.to_hub({name: rows.number(name, like[name].shape) for name in group})
    write(directory, hub, Sources(rows, like, fetch), max_shard_size)


def _check_merged(model: nn.Module, wholes: Iterable[str]) -> None:
    for name in filter(is_adapters, wholes):
        if not getattr(model.get_submodule(name.rpartition(".")[0]), "merged", False):
            raise ValueError(
                f"{name} is a low-rank adapter, for which the hub's layout has no place. Merge it first:"
                " fabric_tp.checkpoint.litgpt.merge_adapters(model, unparallelized)."
            )


def _leave_out_doubles(wholes: dict[str, Whole]) -> None:
    """Of names for the same tensor, all but the first."""
    seen: set[int] = set()
    for name, whole in list(wholes.items()):
        tensor = whole.parts[0].tensor
        if id(tensor) in seen:
            del wholes[name]
        seen.add(id(tensor))


def _equal(one: Whole, other: Whole) -> bool:
    """Whether two tensors that are split alike have the same values, on all ranks."""
    same = torch.tensor(float(one.shape == other.shape and torch.equal(one.parts[0].local, other.parts[0].local)))
    if dist.is_initialized():
        same = same.to(one.parts[0].local.device)
        dist.all_reduce(same, dist.ReduceOp.MIN)
    return bool(same)


def save_config(model: nn.Module, directory: str | Path) -> None:
    """Write ``config.json`` into a directory of litgpt that has none, where it is known: for a Llama.

    ``litgpt evaluate``, for one, needs it. One process should call it.

    Args:
        model: A ``litgpt.GPT``, parallelized or not.
        directory: Which holds, or will hold, its ``lit_model.pth``.
    """
    names = hub_names(unwrapped(model))
    if names.save_config:
        names.save_config(Path(directory))


def write_config(names: HubNames, directory: Path, like: str | Path | None, tied: bool) -> None:
    """All that a directory of the hub has beside weights."""
    if like:
        copy_other_files(Path(like), directory)
    if names.save_config:
        names.save_config(directory)
    if names.tied:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(config | {"tie_word_embeddings": tied}, indent=2) + "\n")


def copy_other_files(source: Path, directory: Path) -> None:
    for pattern in OTHER_FILES:
        for file in source.glob(pattern):
            if not (directory / file.name).exists():
                shutil.copy(file, directory)


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _nothing() -> None:
    pass
