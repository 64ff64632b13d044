"""Tensors that are made again in the backward instead of being kept for it.

Autograd keeps a matrix product's input for the gradient of the weight. Where that input is the output of a function
that keeps all it needs anyway (a norm its own input, an activation the linear layers' outputs), it need not be kept as
well: :class:`Remakes` is such a function, and :func:`maker_of` finds it in the graph behind a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from fabric_tp import _torch


class Remakes(Function):
    """An autograd function whose output can be made again, during the backward, from what it has saved."""

    @staticmethod
    def remake(ctx: Any) -> Tensor:
        raise NotImplementedError


def maker_of(x: Tensor) -> Any:
    """The node of the autograd graph that can make ``x`` again, or None.

    An operation in place on ``x`` puts another node there, so that what is made again is always what ``x`` was.
    """
    function = _torch.function_of(x)
    return x.grad_fn if function is not None and issubclass(function, Remakes) else None


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``, for the compiler: it sees no nodes of a graph, but does know what is to be made again."""
    return checkpoint(function, *inputs, use_reentrant=False)


def remake(maker: Any) -> Tensor:
    return maker._forward_cls.remake(maker)


def saved(ctx: Any) -> tuple[Any, ...]:
    """What a node has saved. The nodes after it ask first, and activation checkpointing gives it out only once."""
    held = getattr(ctx, "held", None)
    if held is None:
        held = ctx.held = ctx.saved_tensors
    return held


def release(ctx: Any) -> tuple[Any, ...]:
    """The same, for the node's own backward, which is the last to ask."""
    tensors = saved(ctx)
    ctx.held = None
    return tensors
