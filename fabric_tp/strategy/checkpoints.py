"""What Fabric's checkpoints hold, beside what a model has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def model_of(state: Mapping[str, Any]) -> tuple[str, nn.Module]:
    return next((key, each) for key, each in state.items() if isinstance(each, nn.Module))


def check_saving(async_save: bool, save_distributed_checkpoint: bool, keep_last: int | None) -> None:
    if async_save and not save_distributed_checkpoint:
        raise ValueError(
            "async_save=True needs save_distributed_checkpoint=True: before rank 0 can write one file, all ranks have"
            " to send it what they have."
        )
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last={keep_last} would keep no checkpoint. 1 keeps the newest, and None keeps all.")


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all ranks save together, the tensors of model and optimizers, and what is left, which one rank saves.

    Raises:
        ValueError: There is no parallel model, or more than one.
    """
    models = [each for each in state.values() if _is_parallel(each)]
    if len(models) != 1:
        raise ValueError(
            f"The state to save has {len(models)} models that fabric.setup() has made parallel, and a checkpoint holds"
            " exactly one, as in fabric.save(path, {'model': model, ...})."
        )
    shared: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, each in state.items():
        if isinstance(each, nn.Module):
            shared[key] = get_model_state_dict(each)
        elif isinstance(each, Optimizer):
            shared[key] = get_optimizer_state_dict(models[0], each)
        else:
            rest[key] = each.state_dict() if hasattr(each, "state_dict") and hasattr(each, "load_state_dict") else each
    return shared, rest


def _is_parallel(module: object) -> bool:
    return isinstance(module, nn.Module) and any(isinstance(each, DTensor) for each in module.parameters())


def check_for_unexpected_keys(path: Path, state: Mapping[str, Any]) -> None:
    if not any(isinstance(each, nn.Module) for each in state.values()):
        return
    key, model = model_of(state)
    if path.is_dir():
        prefix = f"{key}."
        saved = FileSystemReader(path).read_metadata().state_dict_metadata
        found = {name.removeprefix(prefix) for name in saved if name.startswith(prefix)}
    else:
        found = torch.load(path, mmap=True, map_location="cpu", weights_only=True).get(key, {}).keys()
    unexpected = sorted(found - get_model_state_dict(model).keys())
    if unexpected:
        raise ValueError(
            f"{str(path)!r} has {len(unexpected)} keys that the model has not, such as {unexpected[:3]}. Load it into"
            " the model that it was made from, or pass strict=False to leave them out."
        )
