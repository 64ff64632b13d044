"""litgpt's ``lit_model.pth``: one state dict, not nested, with ``attn.qkv`` in one piece."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_tp.shards import copy_shard, gather_shards
from fabric_tp.styles.fused_colwise import fused_parameters


def save(model: nn.Module, path: str | Path) -> None:
    """Write the whole model to one file, with the keys of the unparallelized model.

    All ranks must call it; the first writes. One whole tensor at a time is on the device. The file appears under its
    name when it is complete.

    Example::

        fabric_tp.checkpoint.litgpt.save(model, "out/final/lit_model.pth")
    """
    path = Path(path)
    state: dict[str, Tensor] = {}
    for name, parts in _whole_tensors(model).items():
        whole = [gather_shards(part).cpu() for part in parts]
        if dist.get_rank() == 0:
            state[name] = whole[0] if len(whole) == 1 else torch.cat(whole)
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        incomplete = path.with_name(path.name + ".incomplete")
        torch.save(state, incomplete)
        os.replace(incomplete, path)
    dist.barrier()


def load(model: nn.Module, path: str | Path) -> None:
    """Read a ``lit_model.pth`` into a parallelized model; each rank reads only its shards of the memory-mapped file.

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
