"""From any layout of a checkpoint to any other, on one machine, tensor by tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fabric_tp.architectures.hub import HubNames, hub_names, meta_model, save_as_litgpt
from fabric_tp.checkpoint.atomic import replacing
from fabric_tp.checkpoint.distributed import Distributed, save_distributed
from fabric_tp.checkpoint.files import LITGPT, Files
from fabric_tp.checkpoint.huggingface import CONFIG, copy_other_files, numbered, write_config, write_weights
from fabric_tp.checkpoint.parts import check_names, check_shape
from fabric_tp.checkpoint.writing import Sources
from fabric_tp.mesh import TENSOR_PARALLEL, fake_mesh
from fabric_tp.parallelize import auto
from fabric_tp.plan import apply_plan
from fabric_tp.plan.plan import tied_parameters

Layout = Literal["litgpt", "huggingface", "distributed"]

CONFIGS = ("model_config.yaml", CONFIG)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Layout,
    like: str | Path | None = None,
    model_name: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Turn a checkpoint into one of another layout, without a GPU, and without ever holding the whole model.

    Args:
        source: A directory: litgpt's, with lit_model.pth; the hub's, with safetensors; or a training checkpoint.
        target: The directory to write, which may not exist. It appears when it is complete.
        to: "litgpt" for litgpt's commands, "huggingface" for Transformers, "distributed" for fabric.load on any mesh.
        like: A directory of the same model that has what the source lacks: config and tokenizer.
        model_name: Name that litgpt has for the model, if it is not the directory's, as for litgpt's own converters.
        dtype: Of the result, such as "bfloat16"; by default that of the source.
        max_shard_size: Of a file for Transformers.

    Raises:
        ValueError: The target exists; an option is unknown; the source is no checkpoint, or of an unknown model, or
            lacks a tensor.
    """
    source, target = Path(source), Path(target)
    about = _about(source, like)
    _check(target, to, dtype)
    model = meta_model(about, model_name, of_litgpt=to == "litgpt")
    names = hub_names(model)
    if to == "huggingface" and names.save_config is None and not (about / CONFIG).is_file():
        raise ValueError(
            f"{str(about)!r} has no {CONFIG}, which Transformers needs. Give a directory that has one as `like`, such"
            " as a download of the same model."
        )
    with (
        fake_mesh(1, 1) as meshes,
        _opened(source, model, names, mesh := meshes[TENSOR_PARALLEL]) as tensors,
        replacing(target, moves=True, barrier=lambda: None) as unfinished,
    ):
        tensors = tensors.cast(getattr(torch, dtype)) if dtype else tensors
        unfinished.mkdir()
        if to == "litgpt":
            save_as_litgpt(model, unfinished, tensors.fetch)
        elif to == "distributed":
            save_distributed(unfinished, _divided(model, mesh), tensors.like, tensors.fetch)
        else:
            tied = names.tied is not None and torch.equal(*map(tensors.fetch, names.tied))
            write_config(names, unfinished, about, tied)
            doubles = [name for _, *others in tied_parameters(model) for name in others]
            doubles += names.tied[:1] if names.tied and tied else []
            kept = {name: tensor for name, tensor in tensors.like.items() if name not in doubles}
            write_weights(unfinished, names, kept, tensors.fetch, max_shard_size)
        copy_other_files(about, unfinished)


def _check(target: Path, to: str, dtype: str | None) -> None:
    if target.exists():
        raise ValueError(f"{str(target)!r} exists. Give a directory that does not.")
    if to not in get_args(Layout):
        raise ValueError(f"to={to!r} is no layout of a checkpoint. There are {', '.join(get_args(Layout))}.")
    if dtype and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype={dtype!r} is none of torch's, such as float32, bfloat16 or float16.")


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a model, which are there when they are asked for."""

    like: dict[str, Tensor]
    """Shape and dtype of each."""
    fetch: Callable[[str], Tensor]

    def cast(self, dtype: torch.dtype) -> _Tensors:
        like = {name: each.to(dtype) if each.is_floating_point() else each for name, each in self.like.items()}
        return _Tensors(like, lambda name: self.fetch(name).to(like[name].dtype))

    def with_doubles(self, groups: list[list[str]]) -> _Tensors:
        """With all names of tensors that have several."""
        there = {name: next((each for each in group if each in self.like), "") for group in groups for name in group}
        doubles = {name: self.like[same] for name, same in there.items() if same}
        return _Tensors(self.like | doubles, lambda name: self.fetch(there.get(name, name)))


def _about(source: Path, like: str | Path | None) -> Path:
    """The directory that says what model it is."""
    if like:
        return Path(like)
    beside = [source, source.parent]  # a training checkpoint may lie in the directory of its run
    return next((each for each in beside if any((each / name).is_file() for name in CONFIGS)), source)


def _divided(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """With the parameters that a parallelized model has."""
    apply_plan(auto().plan(model, tensor_parallel_size=1), model, mesh)
    return model


@contextmanager
def _opened(source: Path, model: nn.Module, names: HubNames, mesh: DeviceMesh) -> Iterator[_Tensors]:
    """The source's tensors by the model's names.

    Raises:
        ValueError: It is no checkpoint of the model.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if (source / ".metadata").is_file():
        checkpoint = Distributed(source, _divided(copy.deepcopy(model), mesh))
        yield _Tensors(checkpoint.like, checkpoint.fetch)
        return
    with Files(source) as files:
        if (source / LITGPT).is_file():
            found = _Tensors(files.like(), lambda name: files.read(name, ()))
        else:
            found = _from_hub(files, names).with_doubles(tied_parameters(model))
        check_names(source, wanted.keys() - found.like.keys(), found.like.keys() - wanted.keys())
        for name, shape in wanted.items():
            check_shape(source, name, found.like[name].shape, shape)
        yield found


def _from_hub(files: Files, names: HubNames) -> _Tensors:
    numbers = numbered(files, names)
    sources = Sources(numbers.rows, files.like(), lambda name: files.read(name, ()))

    def fetch(name: str) -> Tensor:
        held = {each: sources.fetch(each) for each in sources.names(numbers.found[name])}
        return sources.assemble(numbers.found[name], held)

    return _Tensors({name: sources.empty(each) for name, each in numbers.found.items()}, fetch)
