"""What Fabric puts around a model."""

from __future__ import annotations

from lightning.fabric import is_wrapped
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself."""
    return model.module if is_wrapped(model) else model  # type: ignore[return-value]
