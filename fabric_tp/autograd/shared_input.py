"""The input that several linear layers share: gathered when they take it, and its gradient summed when all are done.

See ``linear.py``, whose table and list are about both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

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
from fabric_tp.autograd.halves import Exchange, Issue, current_half, give_way, stand_in
from fabric_tp.autograd.recompute import Recomputable, let_go, producer_of, recompute, recomputed_by_compiler, saved


def enter(x: Tensor, group: Group, *, sequence: bool, padding: int = 0, dim: int = SEQUENCE_DIM) -> Tensor:
    """The whole input of sharded linear layers, of which each rank computes a part of the gradient.

    Args:
        x: ``(b, s/t, h)`` if ``sequence``, else ``(b, s, h)``. It is what is kept, unless it can be recomputed itself.
        group: The tensor-parallel ranks; more than one.
        sequence: Gather it forward, and again in the backward, and scatter its gradient. Otherwise it is whole already.
        padding: Rows at the end of the gathered sequence that are cut off.
        dim: Of the sequence.

    Returns:
        ``(b, s, h)``, for :func:`fabric_tp.autograd.linear.linear`. Hooks on it must be there before layers take it.

    Raises:
        ValueError: In the backward, if second derivatives are asked for.
    """
    if torch.compiler.is_compiling():
        return recomputed_by_compiler(traceable_gather, x, group, padding, dim) if sequence else copy(x, group)
    producer = producer_of(x)
    if producer is None and not sequence:  # nothing to recompute: the layers keep it, if they train
        return copy(x, group)
    turn = None
    if current_half():
        ways: Any = {"dim": dim, "size": group.size, "name": group.name, "padding": padding}
        turn = Exchange(partial(start_gather, **ways) if sequence else None, None)
        x = Issue.apply(x, turn)
        give_way()
    return Enter.apply(x, group, sequence, padding, dim, producer, turn)


def gather_early() -> Callable[[], None] | None:
    """To be called in the forward by what sums the outputs of the layers that took the last input; and what it returns,
    in the backward, when the gradient of that sum is there.

    Then nothing is on the way, and the input is gathered beside all that is computed until its layers need it. It is
    called once for an input, and keeps the node of one that would live anyway.
    """
    entered, node = _entered.get(), None
    if entered is not None:
        _entered.set(None)
        node = entered()
    return None if node is None else partial(_begin_to_gather, node)


_entered: ContextVar[weakref.ref[Any] | None] = ContextVar("entered", default=None)
"""The node of the last input that was gathered, by this half of the batch if they take turns."""


def _begin_to_gather(node: Any) -> None:
    shared = node.shared_input
    shared.begin()
    if shared.readers and shared.input is None and _torch.comes_to(node):
        shared.input = start_input(node)


class SharedInput:
    """An input that several layers took: what they have done about its gradient in the backward that is running."""

    def __init__(self) -> None:
        self.uses = 0
        """Layers which took it."""
        self.readers = 0
        """Those of them with a weight that trains, whose gradient needs it."""
        self.backward = -1
        self.clear()

    def begin(self) -> None:
        """Start from nothing, if this backward is another one than that which was here last."""
        if self.backward != _torch.current_backward():
            self.backward = _torch.current_backward()
            self.clear()

    def clear(self) -> None:
        self.done = self.read = 0
        self.input: Callable[[], Tensor] | None = None
        """Waits for it."""
        self.grad: Tensor | None = None
        """``(b, s, h)``, this rank's part."""
        self.sum: Callable[[], Tensor] | None = None
        """Waits for the gradient's sum over the ranks."""


class Enter(Recomputable):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: Group,
        sequence: bool,
        padding: int,
        dim: int,
        producer: Any,
        turn: Exchange | None,
    ) -> Tensor:
        ctx.group, ctx.sequence, ctx.padding, ctx.dim = group, sequence, padding, dim
        ctx.producer, ctx.shared_input = producer, SharedInput()
        ctx.set_materialize_grads(False)
        if producer is None:
            ctx.save_for_backward(x)
        if turn:
            ctx.zero, ctx.shape = x.new_zeros(()), x.shape
        ctx.turn = turn
        if not sequence:
            entered = x.view_as(x)
        else:
            _entered.set(weakref.ref(ctx))
            entered = turn.wait() if turn else start_gather(x, dim, group.size, group.name, padding)()
        ctx.version = entered._version
        return entered

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        return start_input(ctx)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        let_go(ctx)
        shared = ctx.shared_input
        shared.begin()
        if shared.input is not None:  # nor did all need it
            shared.input()
        if shared.grad is not None:  # not all the layers that took the input were in this backward
            grad = shared.grad if grad is None else shared.grad.add_(grad)
        sums = [each for each in (shared.sum, None if grad is None else start_sum(ctx, grad)) if each]
        shared.clear()
        x_grad = None
        if sums and ctx.turn:  # the node that issued the gather waits
            ctx.turn.pending = partial(_added, sums)
            x_grad = stand_in(ctx.zero, ctx.shape)
        elif sums:
            x_grad = _added(sums)
        return x_grad, None, None, None, None, None, None


def _added(sums: list[Callable[[], Tensor]]) -> Tensor:
    parts = [wait() for wait in sums]
    return sum(parts[1:], parts[0])


def start_sum(ctx: Any, grad: Tensor) -> Callable[[], Tensor]:
    if ctx.sequence:
        return start_reduce_scatter(grad, ctx.dim, ctx.group.size, ctx.group.name)
    return start_reduce(grad, ctx.group.name)


def start_input(ctx: Any) -> Callable[[], Tensor]:
    refuse_second_derivatives()
    x = recompute(ctx.producer) if ctx.producer is not None else saved(ctx)[0]
    if not ctx.sequence:
        return lambda: x
    return start_gather(x, ctx.dim, ctx.group.size, ctx.group.name, ctx.padding)


def refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():  # which it is within a backward with create_graph=True only
        raise ValueError(
            "create_graph=True asks for second derivatives, and the input of tensor-parallel layers has none: gathers"
            " and sums over the ranks are not part of the backward's graph. Compute them on one device."
        )
