"""Which classes are linear layers, ``y = x W^T + b``, and how each stores W. Nothing here knows about ranks."""

from __future__ import annotations

from typing import Literal

from torch import nn

Storage = Literal["outputs_first", "inputs_first"]
"""The shape of the weight: (outputs, inputs), as torch has it, or (inputs, outputs)."""

LINEAR: dict[str, Storage] = {
    "torch.nn.modules.linear.Linear.forward": "outputs_first",
    "transformers.pytorch_utils.Conv1D.forward": "inputs_first",  # GPT-2
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward": "outputs_first",  # rounds before the bias
}
"""By the full name of the forward, so that a subclass with a forward of its own is none of them."""


def storage(module: nn.Module) -> Storage | None:
    """How a linear layer stores its weight; None for any other module, and for one whose forward is not known."""
    forward = type(module).forward
    return LINEAR.get(f"{forward.__module__}.{forward.__qualname__}")


def features(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; zeros for any other module."""
    kind = storage(module)
    if kind is None:
        return getattr(module, "in_features", 0), getattr(module, "out_features", 0)
    first, second = module.get_parameter("weight").shape
    return (second, first) if kind == "outputs_first" else (first, second)
