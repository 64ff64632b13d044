"""Norms that compute what a model's own compute and keep less for the backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fabric_tp.autograd.recompute import Recomputable, release, saved


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, unit_offset: bool = False) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019), in fp32 inside.

    Keeps ``x`` and a number per row.

    Args:
        x: ``(..., h)``.
        weight: ``(h,)``, or None for one.
        eps: Added to the mean square.
        unit_offset: Multiply with ``1 + weight``, as Gemma does.

    Returns:
        ``(..., h)``, of the dtype of ``x``.
    """
    if torch.compiler.is_compiling():  # which recomputes it without being told, if only a shard of it is needed
        return _normalise(x, _inverse_root_mean_square(x, eps), _scale(weight, unit_offset))
    return _RMSNorm.apply(x, weight, eps, unit_offset)


class _RMSNorm(Recomputable):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Tensor:
        ctx.eps, ctx.unit_offset = eps, unit_offset
        inverse = _inverse_root_mean_square(x, eps)
        ctx.save_for_backward(x, inverse, weight)
        return _normalise(x, inverse, _scale(weight, unit_offset))

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        x, inverse, weight = saved(ctx)
        return _normalise(x, _differentiable(inverse, x, ctx.eps), _scale(weight, ctx.unit_offset))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, weight = release(ctx)
        inverse = _differentiable(inverse, x, ctx.eps)
        normed, exact = x.float() * inverse, grad.float()
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (exact * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if (scale := _scale(weight, ctx.unit_offset)) is not None:
            exact = exact * scale
        x_grad = (exact - normed * (exact * normed).mean(-1, keepdim=True)).mul_(inverse)
        return x_grad.to(x.dtype), weight_grad, None, None


def _differentiable(inverse: Tensor, x: Tensor, eps: float) -> Tensor:
    """The inverse that was kept, or with ``create_graph=True`` the same as a function of ``x``."""
    return _inverse_root_mean_square(x, eps) if torch.is_grad_enabled() else inverse


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
    """``torch.nn.functional.layer_norm``, which keeps its input only: mean and deviation are recomputed.

    Args:
        x: ``(..., *shape)``.
        shape: Of what is normalised together.
        weight: ``shape``, or None for one.
        bias: ``shape``, or None for zero.
        eps: Added to the variance.

    Returns:
        ``(..., *shape)``, of the dtype that torch's has.
    """
    if torch.compiler.is_compiling():
        return F.layer_norm(x, shape, weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, shape, eps)


class _LayerNorm(Recomputable):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], eps: float
    ) -> Tensor:
        y = F.layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.eps, ctx.dtype = shape, eps, y.dtype
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        x, weight, bias = saved(ctx)
        return F.layer_norm(x.to(ctx.dtype), ctx.shape, weight, bias, ctx.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = release(ctx)
        needed = ctx.needs_input_grad[:3]
        grads = _layer_norm_backward(grad, x.to(ctx.dtype), ctx.shape, weight, bias, ctx.eps, needed)
        return (None if grads[0] is None else grads[0].to(x.dtype)), *grads[1:], None, None


def _layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of ``x``, ``weight`` and ``bias``, of those ``needed``."""
    _, mean, inverse = torch.ops.aten.native_layer_norm(x, shape, weight, bias, eps)
    return torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, inverse, weight, bias, needed)
