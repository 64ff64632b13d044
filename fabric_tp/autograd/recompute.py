"""Tensors that are recomputed in the backward instead of being kept for it.

Autograd keeps a matrix product's input for the gradient of the weight. Where that input is the output of a function
that keeps all it needs anyway (a norm its own input, an activation the linear layers' outputs), it need not be kept as
well: :class:`Recomputable` is such a function, and :func:`producer_of` finds it in the graph behind a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from fabric_tp import _torch


class Recomputable(Function):
    """An autograd function whose output can be recomputed, during the backward, from what it has saved.

    A forward whose output is not of version 0 stores the version as ``ctx.version``.
    """

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        """Compute the forward's output again, from :func:`saved`."""
        raise NotImplementedError


def producer_of(x: Tensor) -> Any:
    """Node of the autograd graph that can recompute ``x``, or None.

    What is recomputed is what ``x`` is now: an operation in place puts another node there, or, under ``no_grad``, gives
    ``x`` another version.
    """
    node = x.grad_fn
    function = _torch.function_of(node)
    if function is None or not issubclass(function, Recomputable):
        return None
    return node if x._version == getattr(node, "version", 0) else None


def part_of(x: Tensor, dim: int, first: int, length: int) -> Tensor:
    """``x.narrow(dim, first, length)``, which need not be kept where ``x`` need not."""
    producer = producer_of(x)
    if producer is None:
        return x.narrow(dim, first, length)
    return _Part.apply(x, producer, dim, first, length)


def recompute(producer: Any) -> Tensor:
    """Compute again what a node that :func:`producer_of` found has returned."""
    return _torch.function_of(producer).recompute(producer)


def recomputed_by_compiler(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``, of which the compiler keeps the inputs: it sees no nodes, but does know checkpoints."""
    return checkpoint(function, *inputs, use_reentrant=False)


def saved(ctx: Any) -> tuple[Any, ...]:
    """Tensors that a node has saved, taken once in a backward: activation checkpointing gives them out only once.

    The nodes after it ask first; it holds them until its own backward, which is the last to ask, lets them go.
    """
    backward = _torch.current_backward()
    held = getattr(ctx, "held", None)
    if held is None or held[0] != backward:
        held = ctx.held = (backward, ctx.saved_tensors)
    return held[1]


def release(ctx: Any) -> tuple[Any, ...]:
    """Tensors that a node has saved, for its own backward."""
    tensors = saved(ctx)
    let_go(ctx)
    return tensors


def let_go(ctx: Any) -> None:
    """Hold nothing for nodes after this one any more."""
    ctx.held = None


class _Part(Recomputable):
    @staticmethod
    def forward(ctx: Any, x: Tensor, producer: Any, dim: int, first: int, length: int) -> Tensor:
        ctx.producer, ctx.place, ctx.shape = producer, (dim, first, length), x.shape
        part = x.narrow(*ctx.place)
        ctx.version = part._version
        return part

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        return recompute(ctx.producer).narrow(*ctx.place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        whole = grad.new_zeros(ctx.shape)
        whole.narrow(*ctx.place).copy_(grad)
        return whole, None, None, None, None
