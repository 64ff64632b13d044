"""litgpt's ``lit_model.pth``: one state dict, not nested, with ``attn.qkv`` in one piece; and its files of adapters."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_tp.architectures import LITGPT
from fabric_tp.checkpoint.files import Files
from fabric_tp.checkpoint.parts import (
    Whole,
    check_names,
    check_shape,
    is_adapters,
    wanted_of,
    whole_tensors,
    without_adapters,
)
from fabric_tp.styles.low_rank_colwise import DOWN, UP
from fabric_tp.styles.quantized import quantized_weights
from fabric_tp.wrapping import unwrapped


def save(model: nn.Module, path: str | Path, *, adapters: bool = True) -> None:
    """Write the whole model to one file, with the keys of the unparallelized model.

    All ranks must call it; the first writes. One whole tensor at a time is on the device. The file appears under its
    name when it is complete.

    Args:
        adapters: ``False``: of a ``litgpt.lora.GPT``, leave out the low-rank adapters and write what a ``litgpt.GPT``
            reads. :func:`merge_adapters` first adds them to the weights.

    Example::

        fabric_tp.checkpoint.litgpt.save(model, "out/final/lit_model.pth")
    """
    wholes = whole_tensors(model)
    state = _gathered(wholes if adapters else without_adapters(wholes))
    _write(state, Path(path))


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the low-rank adapters of a ``litgpt.lora.GPT``, and nothing else, as ``litgpt finetune_lora`` does.

    All ranks must call it. ``litgpt merge_lora`` reads the file, which it expects to be called ``lit_model.pth.lora``.

    Raises:
        ValueError: The model has none.

    Example::

        fabric_tp.checkpoint.litgpt.save_adapters(model, "out/final/lit_model.pth.lora")
    """
    adapters = {key: whole for key, whole in whole_tensors(model).items() if is_adapters(key)}
    if not adapters:
        raise ValueError("The model has no low-rank adapters to save: it is no litgpt.lora.GPT, or its lora_r is 0.")
    _write({"model": _gathered(adapters)}, Path(path))


@torch.no_grad()
def merge_adapters(model: nn.Module, unparallelized: nn.Module) -> None:
    """Add each low-rank adapter to the weight that it changes; then the model computes without it.

    All ranks must call it, and each changes its own shards. What is added is computed as ``litgpt merge_lora`` does,
    from the whole of an adapter, on the CPU: with as many threads (``torch.get_num_threads()``) the weights are bitwise
    the same. Every rank holds the change of one whole weight at a time.

    Args:
        model: A parallelized ``litgpt.lora.GPT``.
        unparallelized: The same model as it was before, of which only shapes and sizes matter: on the meta device.

    Raises:
        ValueError: The models have not the same adapters, or there are none; weights are quantized.

    Example::

        with torch.device("meta"):
            unparallelized = litgpt.lora.GPT(config)
        fabric_tp.checkpoint.litgpt.merge_adapters(model, unparallelized)
        fabric_tp.checkpoint.litgpt.save(model, "out/final/lit_model.pth", adapters=False)
    """
    model = unwrapped(model)
    if quantized_weights(model):
        raise ValueError(
            "The weights are quantized, and what adapters add would be rounded with them. Make parameters of them"
            " first, fabric_tp.dequantize(model), and read the checkpoint again, which undoes the rounding."
        )
    wholes = whole_tensors(model)
    found = {key.rpartition(".")[0] for key in wholes if is_adapters(key)}
    expected = {key.rpartition(".")[0] for key in unparallelized.state_dict() if is_adapters(key)}
    if found != expected or not found:
        raise ValueError(
            f"The model has {len(found)} low-rank adapters and the unparallelized one {len(expected)}, of which"
            f" {len(found & expected)} are in both. Give the litgpt.lora.GPT that it was made from."
        )
    for path in sorted(found):
        whole = copy.deepcopy(unparallelized.get_submodule(path)).to_empty(device="cpu")
        for name in (DOWN, UP):
            whole.register_parameter(name, nn.Parameter(wholes[f"{path}.{name}"].gather().cpu()))
        change = whole.get_lora_AB()  # type: ignore[operator]
        weight = next(wholes[key] for base in LITGPT.adapter_bases if (key := f"{path}.{base}.weight") in wholes)
        for part in weight.parts:
            part.local.add_(change[part.region].to(part.local.device))
        model.get_submodule(path).merged = True  # type: ignore[assignment]


def _gathered(wholes: Mapping[str, Whole]) -> dict[str, Tensor]:
    """On the first rank; nothing on the others."""
    state: dict[str, Tensor] = {}
    for name, whole in wholes.items():
        tensor = whole.gather().cpu()
        if dist.get_rank() == 0:
            state[name] = tensor
    return state


def _write(state: Mapping[str, object], path: Path) -> None:
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        incomplete = path.with_name(path.name + ".incomplete")
        torch.save(state, incomplete)
        os.replace(incomplete, path)
    dist.barrier()


@torch.no_grad()
def load(model: nn.Module, path: str | Path) -> None:
    """Read a ``lit_model.pth`` into a parallelized model; each rank reads only its shards of the memory-mapped file.

    A ``litgpt.lora.GPT`` takes the file of a ``litgpt.GPT`` as well; its adapters then stay what they are.

    Raises:
        ValueError: The file is missing, lacks a tensor, has one too many, or one of another shape.

    Example::

        fabric_tp.checkpoint.litgpt.load(model, "checkpoints/meta-llama/Llama-3.2-1B/lit_model.pth")
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint file {str(path)!r}. litgpt calls it lit_model.pth.")
    with Files(path) as files:
        wanted = wanted_of(model, files.shapes)
        check_names(path, wanted.keys() - files.shapes.keys(), files.shapes.keys() - wanted.keys())
        for name, whole in wanted.items():
            check_shape(path, name, files.shapes[name], whole.shape)
        for name, whole in wanted.items():
            for part in whole.parts:
                with part.filled() as local:
                    local.copy_(files.read(name, part.region))
