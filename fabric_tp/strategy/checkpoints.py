"""What Fabric's checkpoints hold, beside what a model has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict


def model_of(state: Mapping[str, Any]) -> tuple[str, nn.Module]:
    return next((key, each) for key, each in state.items() if isinstance(each, nn.Module))


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
