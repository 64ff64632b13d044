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
from fabric_tp.shards import add_to_shard, copy_shard, gather_shards
from fabric_tp.styles.fused_colwise import fused_parameters
from fabric_tp.styles.low_rank_colwise import DOWN, UP


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
    tensors = _whole_tensors(model)
    state = _gathered(tensors if adapters else _without_adapters(tensors))
    _write(state, Path(path))


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the low-rank adapters of a ``litgpt.lora.GPT``, and nothing else, as ``litgpt finetune_lora`` does.

    All ranks must call it. ``litgpt merge_lora`` reads the file, which it expects to be called ``lit_model.pth.lora``.

    Raises:
        ValueError: The model has none.

    Example::

        fabric_tp.checkpoint.litgpt.save_adapters(model, "out/final/lit_model.pth.lora")
    """
    adapters = {key: parts for key, parts in _whole_tensors(model).items() if _is_adapters(key)}
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
        ValueError: The models have not the same adapters, or there are none.

    Example::

        with torch.device("meta"):
            unparallelized = litgpt.lora.GPT(config)
        fabric_tp.checkpoint.litgpt.merge_adapters(model, unparallelized)
        fabric_tp.checkpoint.litgpt.save(model, "out/final/lit_model.pth", adapters=False)
    """
    tensors = _whole_tensors(model)
    found = {key.rpartition(".")[0] for key in tensors if _is_adapters(key)}
    expected = {key.rpartition(".")[0] for key in unparallelized.state_dict() if _is_adapters(key)}
    if found != expected or not found:
        raise ValueError(
            f"The model has {len(found)} low-rank adapters and the unparallelized one {len(expected)}, of which"
            f" {len(found & expected)} are in both. Give the litgpt.lora.GPT that it was made from."
        )
    for path in sorted(found):
        whole = copy.deepcopy(unparallelized.get_submodule(path)).to_empty(device="cpu")
        for name in (DOWN, UP):
            value = torch.cat([gather_shards(part).cpu() for part in tensors[f"{path}.{name}"]])
            whole.register_parameter(name, nn.Parameter(value))
        change = whole.get_lora_AB()  # type: ignore[operator]
        weights = next(tensors[key] for base in LITGPT.adapter_bases if (key := f"{path}.{base}.weight") in tensors)
        for part, rows in zip(weights, change.split([len(part) for part in weights]), strict=True):
            add_to_shard(part, rows)
        model.get_submodule(path).merged = True  # type: ignore[assignment]


def _gathered(tensors: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """On the first rank; nothing on the others."""
    state: dict[str, Tensor] = {}
    for name, parts in tensors.items():
        whole = [gather_shards(part).cpu() for part in parts]
        if dist.get_rank() == 0:
            state[name] = whole[0] if len(whole) == 1 else torch.cat(whole)
    return state


def _write(state: Mapping[str, object], path: Path) -> None:
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        incomplete = path.with_name(path.name + ".incomplete")
        torch.save(state, incomplete)
        os.replace(incomplete, path)
    dist.barrier()


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
    state = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    state = state.get("model", state)
    wanted = _whole_tensors(model)
    if not any(_is_adapters(key) for key in state) and any(_is_base(key) for key in wanted):
        wanted = _without_adapters(wanted)
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            f"{str(path)!r} does not fit the model: it lacks {len(missing)} keys, such as {missing[:3]}, and has"
            f" {len(unexpected)} that the model does not, such as {unexpected[:3]}."
        )
    for name, parts in wanted.items():
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:]) if len(parts) > 1 else parts[0].shape
        if tuple(state[name].shape) != tuple(shape):
            raise ValueError(
                f"{name} has the shape {tuple(state[name].shape)} in {str(path)!r}, the model's {tuple(shape)}."
            )
    for name, parts in wanted.items():
        rows = [part.shape[0] for part in parts] if len(parts) > 1 else None
        for part, whole in zip(parts, state[name].split(rows) if rows else [state[name]], strict=True):
            copy_shard(part, whole)


def _whole_tensors(model: nn.Module) -> dict[str, list[Tensor]]:
    """The state dict's tensors by the keys of the unparallelized model, fused ones as a list of their parts."""
    tensors = dict(model.state_dict())
    result: dict[str, list[Tensor]] = {}
    fused = fused_parameters(model)
    for key, tensor in tensors.items():
        result.setdefault(fused[key].whole if key in fused else key, []).append(tensor)
    return result


def _without_adapters(tensors: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """By the keys that they have in a model without adapters."""
    bases = LITGPT.adapter_bases
    return {
        ".".join(name for name in key.split(".") if name not in bases): parts
        for key, parts in tensors.items()
        if not _is_adapters(key)
    }


def _is_adapters(key: str) -> bool:
    return key.rpartition(".")[2] in (DOWN, UP)


def _is_base(key: str) -> bool:
    return any(name in LITGPT.adapter_bases for name in key.split("."))
