"""Norms, activations and attention that compute what a model's own modules compute and keep less for the backward.

Nothing here knows about ranks. A table says which forward is replaced by what is exactly equivalent to it; a subclass
with a forward of its own keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fabric_tp import _torch
from fabric_tp.remake import Remakes, recomputed, release, saved

Activation = Literal["silu", "gelu", "gelu_tanh"]
Table = Mapping[Callable[..., Tensor], type[nn.Module]]
"""From a module's forward to a class to compute with instead, whose forward may use ``super().forward``."""


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, unit_offset: bool = False) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019), in fp32 inside.

    Keeps ``x`` and a number per row.

    Args:
        x: ``(..., h)``.
        weight: ``(h,)``, or None for one.
        eps: Added to the mean square.
        unit_offset: Multiply with ``1 + weight``, as Gemma does.
    """
    if torch.compiler.is_compiling():  # which makes it again without being told, if only a shard of it is needed
        return _normalise(x, _inverse_root_mean_square(x, eps), _scale(weight, unit_offset))
    return _RMSNorm.apply(x, weight, eps, unit_offset)


class _RMSNorm(Remakes):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
        ctx.unit_offset = unit_offset
        inverse = _inverse_root_mean_square(x, eps)
        ctx.save_for_backward(x, inverse, weight)
        return _normalise(x, inverse, _scale(weight, unit_offset))

    @staticmethod
    def remake(ctx: Any) -> Tensor:
        x, inverse, weight = saved(ctx)
        return _normalise(x, inverse, _scale(weight, ctx.unit_offset))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, weight = release(ctx)
        normed, exact = x.float() * inverse, grad.float()
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (exact * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if (scale := _scale(weight, ctx.unit_offset)) is not None:
            exact = exact * scale
        x_grad = (exact - normed * (exact * normed).mean(-1, keepdim=True)).mul_(inverse)
        return x_grad.to(x.dtype), weight_grad, None, None


def _inverse_root_mean_square(x: Tensor, eps: float) -> Tensor:
    exact = x.float()
    return torch.rsqrt(torch.mean(exact * exact, dim=-1, keepdim=True) + eps)


def _scale(weight: Tensor | None, unit_offset: bool) -> Tensor | None:
    if weight is None:
        return None
    return (1 + weight).float() if unit_offset else weight.float()


def _normalise(x: Tensor, inverse: Tensor, scale: Tensor | None) -> Tensor:
    normed = x.float() * inverse
    return (normed if scale is None else normed * scale).to(x.dtype)


def layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``torch.nn.functional.layer_norm``, which keeps its input only: mean and deviation are computed again."""
    if torch.compiler.is_compiling():
        return F.layer_norm(x, shape, weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, shape, eps)


class _LayerNorm(Remakes):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], eps: float
    ) -> Tensor:
        y = F.layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.eps, ctx.dtype = shape, eps, y.dtype
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    def remake(ctx: Any) -> Tensor:
        x, weight, bias = saved(ctx)
        return F.layer_norm(x.to(ctx.dtype), ctx.shape, weight, bias, ctx.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = release(ctx)
        needed = ctx.needs_input_grad[:3]
        grads = _torch.layer_norm_backward(grad, x.to(ctx.dtype), ctx.shape, weight, bias, ctx.eps, needed)
        return (None if grads[0] is None else grads[0].to(x.dtype)), *grads[1:], None, None


def activated(x: Tensor, activation: Activation) -> Tensor:
    """``activation(x)``, which keeps ``x`` only."""
    if torch.compiler.is_compiling():
        return recomputed(ACTIVATIONS[activation], x)
    return _Activated.apply(x, activation)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``activation(gate) * up`` (Shazeer, 2020, "GLU Variants Improve Transformer"), which keeps its inputs only."""
    if torch.compiler.is_compiling():
        return recomputed(_gated, gate, up, activation)
    return _Gated.apply(gate, up, activation)


class _Activated(Remakes):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x)
        return ACTIVATIONS[activation](x)

    @staticmethod
    def remake(ctx: Any) -> Tensor:
        return ACTIVATIONS[ctx.activation](*saved(ctx))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _torch.activation_backward(ctx.activation, grad, *release(ctx)), None


class _Gated(Remakes):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return _gated(gate, up, activation)

    @staticmethod
    def remake(ctx: Any) -> Tensor:
        gate, up = saved(ctx)
        return _gated(gate, up, ctx.activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = release(ctx)
        up_grad = ACTIVATIONS[ctx.activation](gate).mul_(grad)
        return _torch.activation_backward(ctx.activation, grad * up, gate), up_grad, None


def _gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    return ACTIVATIONS[activation](gate) * up


class LeanLayerNorm(nn.Module):
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LeanRMSNorm(nn.Module):
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    eps: float | None

    def forward(self, x: Tensor) -> Tensor:
        if self.eps is None or len(self.normalized_shape) > 1 or x.dtype == torch.float64:
            return super().forward(x)  # type: ignore[misc]
        return rms_norm(x, self.weight, self.eps)


TORCH: Table = {nn.LayerNorm.forward: LeanLayerNorm, nn.RMSNorm.forward: LeanRMSNorm}
