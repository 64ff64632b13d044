"""Two halves of a batch that take turns, so that one computes while the collective of the other runs.

Each half runs the same forward in a greenlet, a function that can stop in its middle, of one thread. Where a collective
was issued, :func:`give_way` lets the other half go on, and the collective is waited for when this one is back. So the
order in which collectives are issued is the same on all ranks.

Autograd runs, of the nodes that are ready, the one that was made last. Both halves make theirs in one thread, so the
backward takes turns as the forward did, in reverse. A collective is therefore two nodes, of which one issues and the
other waits, with the other half's nodes between them: :func:`exchanged`. On a GPU a wait makes all kernels after it
wait as well, so that issue and wait in one node would hide nothing.

A half may stop only where nothing is set that the other must not see: outside of autograd functions' ``forward``,
contexts of this thread, and dispatch modes; :func:`alone` keeps it from it. What was set around both is seen by both.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet
from torch import Tensor
from torch.autograd import Function

Result = TypeVar("Result")
Start = Callable[[Tensor], Callable[[], Tensor]]
"""Issues a collective; what it returns waits for the result."""


@dataclass
class Half:
    """A part of the batch whose turn it is."""

    index: int
    first: int
    """Of its samples, in the batch."""
    size: int
    is_alone: bool = False
    is_ahead: bool = False
    """By as much as a half computes between two collectives, so that it computes while the other's ones run."""
    turns: int = 0
    """How often it gave way."""


class _Turn(threading.local):
    half: Half | None = None


_turn = _Turn()


def current_half() -> Half | None:
    """The half whose turn it is in this thread; None if a whole batch is computed."""
    return _turn.half


def give_way() -> None:
    """Let the other half go on, until it gives way in turn or has ended."""
    if _turn.half is not None and not _turn.half.is_alone:
        _turn.half.turns += 1
        getcurrent().parent.switch()


def give_way_between() -> None:
    """As :func:`give_way`, between the products of two collectives; but let the first half get ahead."""
    half = _turn.half
    if half is not None and half.index == 0 and not half.is_ahead:
        half.is_ahead = True
        return
    give_way()


@contextmanager
def alone() -> Iterator[None]:
    """A time in which the half whose turn it is does not give way."""
    half = _turn.half
    if half is None or half.is_alone:
        yield
        return
    half.is_alone = True
    try:
        yield
    finally:
        half.is_alone = False


def take_turns(function: Callable[[int], Result], sizes: Sequence[int]) -> list[Result]:
    """``function(i)`` for each part of a batch, of ``sizes[i]`` samples, each going on where the others give way."""
    results: dict[int, Result] = {}

    def run(index: int) -> None:
        results[index] = function(index)

    halves = [Half(i, sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    parts = [greenlet(run) for _ in halves]
    outer = _turn.half
    try:
        for part in parts:
            part.gr_context = contextvars.copy_context()
        while not all(part.dead for part in parts):
            for half, part in zip(halves, parts, strict=True):
                if not part.dead:
                    _turn.half = half
                    part.switch(*(() if part else (half.index,)))
    finally:
        for half, part in zip(halves, parts, strict=True):
            if not part.dead:  # after an error; the contexts that it is in are left
                _turn.half = half
                part.throw()
        _turn.half = outer
    return [results[half.index] for half in halves]


class Exchange:
    """A collective of the forward and its conjugate in the backward, each issued by one node and awaited by another."""

    def __init__(self, forward: Start | None, backward: Start | None, then: Callable[[], None] | None = None) -> None:
        self.forward, self.backward, self.then = forward, backward, then
        self.pending: Callable[[], Tensor] | None = None

    def issue(self, start: Start | None, x: Tensor) -> None:
        self.pending = start(x) if start else lambda: x

    def wait(self) -> Tensor:
        pending, self.pending = self.pending, None
        assert pending is not None
        return pending()


def exchanged(
    x: Tensor, forward: Start | None, backward: Start | None, then: Callable[[], None] | None = None
) -> Tensor:
    """The result of a collective, during which the other half goes on.

    Args:
        x: ``(...)``.
        forward: Issues it; None: the result is ``x``.
        backward: Issues that of the gradient; None: it is the gradient of ``x`` as it is.
        then: Is called in the backward when the gradient is there.
    """
    exchange = Exchange(forward, backward, then)
    x = Issue.apply(x, exchange)
    give_way()
    return _Await.apply(x, exchange)


def stand_in(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Something of this shape that takes no memory, for a node to hand on what is not there yet."""
    return like.new_zeros(()).expand(shape)


class Issue(Function):
    """Issues the collective of the forward, and waits for that of the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.exchange = exchange
        exchange.issue(exchange.forward, x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        arrived = ctx.exchange.wait()
        if ctx.exchange.then:
            ctx.exchange.then()
        return arrived, None


class _Await(Function):
    """Waits for the collective of the forward, and issues that of the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.shape = exchange, x.shape
        y = exchange.wait()
        return y.view_as(y) if exchange.forward is None else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.issue(ctx.exchange.backward, grad)
        return stand_in(grad, ctx.shape), None
