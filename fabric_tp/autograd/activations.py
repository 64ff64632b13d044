"""Activations that keep their inputs for the backward, and not their outputs as well."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fabric_tp.autograd.recompute import Recomputable, recomputed_by_compiler, release, saved

Activation = Literal["silu", "gelu", "gelu_tanh"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def activated(x: Tensor, activation: Activation) -> Tensor:
    """``activation(x)`` of ``x`` ``(...)``, which keeps ``x`` only."""
    if torch.compiler.is_compiling():
        return recomputed_by_compiler(ACTIVATIONS[activation], x)
    return _Activated.apply(x, activation)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``activation(gate) * up`` (Shazeer, "GLU Variants Improve Transformer", 2020), which keeps its inputs only.

    Args:
        gate: ``(..., f)``.
        up: ``(..., f)``, of the same dtype.
        activation: A key of :data:`ACTIVATIONS`.
    """
    if torch.compiler.is_compiling():
        return recomputed_by_compiler(_gated, gate, up, activation)
    return _Gated.apply(gate, up, activation)


class _Activated(Recomputable):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x)
        return ACTIVATIONS[activation](x)

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        return ACTIVATIONS[ctx.activation](*saved(ctx))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _activation_backward(ctx.activation, grad, *release(ctx)), None


class _Gated(Recomputable):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return _gated(gate, up, activation)

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        gate, up = saved(ctx)
        return _gated(gate, up, ctx.activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = release(ctx)
        up_grad = ACTIVATIONS[ctx.activation](gate).mul_(grad)
        return _activation_backward(ctx.activation, grad * up, gate), up_grad, None


def _gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    return ACTIVATIONS[activation](gate) * up


def _activation_backward(name: str, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x``, from that of ``silu(x)``, ``gelu(x)`` or ``gelu(x, approximate="tanh")``."""
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if name == "gelu_tanh" else "none")
