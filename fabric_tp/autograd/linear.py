"""Linear layers that keep no copy of an input that can be made again, and the inputs that several of them share.

Of a column-wise layer ``y = x W^T`` the gradient of W needs the whole input x, that of x does not. So the shard of x
(or what a norm made it from) is all that stays, and the backward goes

1. start to gather x again,
2. the gradients of x, ``dy W``, of the layers that share it; start to sum them over the ranks,
3. wait for x; the gradients of W, ``dy^T x``,
4. wait for the sum,

with communication and products side by side (Korthikanti et al., 2022, section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fabric_tp import _torch
from fabric_tp.autograd.collectives import (
    SEQUENCE_DIM,
    Group,
    copy,
    start_gather,
    start_reduce,
    start_reduce_scatter,
    traceable_gather,
)
from fabric_tp.autograd.recompute import Remakes, maker_of, recomputed, release, remake, saved


def enter(x: Tensor, group: Group, *, sequence: bool) -> Tensor:
    """The whole input of sharded linear layers, of which each rank computes a part of the gradient.

    Args:
        x: ``(b, s/t, h)`` if ``sequence``, else ``(b, s, h)``. It is what is kept, unless it can be made again itself.
        group: The tensor-parallel ranks; more than one.
        sequence: Gather it forward, and again in the backward, and scatter its gradient. Otherwise it is whole already.

    Returns:
        ``(b, s, h)``, for :func:`linear`.
    """
    if torch.compiler.is_compiling():
        return recomputed(traceable_gather, x, group) if sequence else copy(x, group)
    maker = maker_of(x)
    if maker is None and not sequence:  # nothing to make again: the layers keep it, if they train
        return copy(x, group)
    return _Enter.apply(x, group, sequence, maker)


def linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> Tensor:
    """``torch.nn.functional.linear`` with a weight that is put together from parts, rows after rows.

    Neither the whole weight is kept for the backward nor, if it can be made again, ``x``.

    Args:
        x: ``(..., h)``.
        weights: Each ``(f, h)``. They must be parameters, or else memory that somebody holds anyway.
        biases: Each ``(f,)``; as many as weights, or none.
    """
    there = [bias for bias in biases if bias is not None]
    if torch.compiler.is_compiling():
        weight = weights[0] if len(weights) == 1 else recomputed(torch.cat, list(weights))
        return F.linear(x, weight, _cat(there) if there else None)
    if maker_of(x) is None and len(weights) == 1:
        return F.linear(x, *_whole(weights, there))
    return _Linear.apply(x, maker_of(x), len(weights), *weights, *there)


class _Passage:
    """What becomes of an input that entered, in one backward."""

    def __init__(self) -> None:
        self.uses = 0
        """Linear layers that took it, and that the backward is going to come to."""
        self.backward = -1

    def begin(self) -> None:
        if self.backward != _torch.current_backward():
            self.backward = _torch.current_backward()
            self.done = 0
            self.input: Callable[[], Tensor] | None = None
            self.grad: Tensor | None = None
            self.sum: Callable[[], Tensor] | None = None


class _Enter(Remakes):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sequence: bool, maker: Any) -> Tensor:
        ctx.group, ctx.sequence, ctx.maker, ctx.passage = group, sequence, maker, _Passage()
        ctx.set_materialize_grads(False)
        if maker is None:
            ctx.save_for_backward(x)
        return start_gather(x, SEQUENCE_DIM, group.size, group.name)() if sequence else x.view_as(x)

    @staticmethod
    def remake(ctx: Any) -> Tensor:
        return _start_input(ctx)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if ctx.maker is None:
            release(ctx)
        passage = ctx.passage
        passage.begin()
        if passage.grad is not None:  # not all the layers that took the input were in this backward
            grad = passage.grad if grad is None else passage.grad.add_(grad)
        parts = [wait() for wait in (passage.sum, None if grad is None else _start_sum(ctx, grad)) if wait]
        passage.input = passage.grad = passage.sum = None
        passage.backward = -1
        return (sum(parts[1:], parts[0]) if parts else None), None, None, None


def _start_sum(ctx: Any, grad: Tensor) -> Callable[[], Tensor]:
    if ctx.sequence:
        return start_reduce_scatter(grad, SEQUENCE_DIM, ctx.group.size, ctx.group.name)
    return start_reduce(grad, ctx.group.name)


def _start_input(ctx: Any) -> Callable[[], Tensor]:
    x = remake(ctx.maker) if ctx.maker is not None else saved(ctx)[0]
    return start_gather(x, SEQUENCE_DIM, ctx.group.size, ctx.group.name) if ctx.sequence else lambda: x


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, maker: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.maker, ctx.count, ctx.dtype, ctx.shape = maker, count, x.dtype, x.shape
        # Saved tensors are counted by activation checkpointing, which would run this product again for the last one.
        ctx.weights = tensors[:count]
        ctx.versions = [weight._version for weight in ctx.weights]
        ctx.trains = any(ctx.needs_input_grad[3 : 3 + count])
        ctx.entered = ctx.trains and maker is not None and maker._forward_cls is _Enter
        if ctx.entered:
            maker.passage.uses += 1
        if maker is None and ctx.trains:
            ctx.save_for_backward(x)
        return F.linear(x, *_whole(tensors[:count], tensors[count:]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.versions != [weight._version for weight in ctx.weights]:
            raise RuntimeError("A weight was changed in place between the forward and the backward that needs it.")
        rows = grad.flatten(0, -2)
        x_grad = None
        if ctx.needs_input_grad[0] and not ctx.entered:
            x_grad = (rows @ _joined(ctx.weights, grad.dtype)).to(ctx.dtype).view(ctx.shape)
        weight_grads: Sequence[Tensor | None] = [None] * ctx.count
        if ctx.trains:
            x = _pass(ctx, rows) if ctx.entered else _input(ctx)
            weight_grads = (rows.t() @ x.flatten(0, -2).to(grad.dtype)).split([len(weight) for weight in ctx.weights])
        return x_grad, None, None, *weight_grads, *_bias_grads(ctx, rows)


def _input(ctx: Any) -> Tensor:
    return ctx.saved_tensors[0] if ctx.maker is None else remake(ctx.maker)


def _pass(ctx: Any, rows: Tensor) -> Tensor:
    """Add to the gradient of an input that entered, start its sum if this is the last part of it; return the input."""
    passage = ctx.maker.passage
    passage.begin()
    if passage.input is None:
        passage.input = _start_input(ctx.maker)
    weight = _joined(ctx.weights, rows.dtype)
    if passage.grad is None:
        passage.grad = (rows @ weight).to(ctx.dtype).view(ctx.shape)
    elif rows.dtype == ctx.dtype:
        passage.grad.flatten(0, -2).addmm_(rows, weight)
    else:
        passage.grad.add_((rows @ weight).view(ctx.shape))
    del weight
    passage.done += 1
    last = passage.done == passage.uses
    if last:
        passage.sum, passage.grad = _start_sum(ctx.maker, passage.grad), None
    x = passage.input()
    passage.input = None if last else lambda: x
    return x


def _bias_grads(ctx: Any, rows: Tensor) -> Sequence[Tensor | None]:
    needed = ctx.needs_input_grad[3 + ctx.count :]
    if not any(needed):
        return [None] * len(needed)
    return rows.sum(0).split([len(weight) for weight in ctx.weights])


def _whole(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    return _cat(weights), _cat(biases) if biases else None


def _joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return _cat(weights).to(dtype)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
