"""Reductions in a block that is computed again in the backward: their results are kept, and what made them is not run.

``torch.utils.checkpoint`` can keep the results of single operators. A reduction's result would not save the matrix
product before it from running again, for nothing; here both are left out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fabric_tp.autograd.halves import Half, current_half, give_way
from fabric_tp.autograd.recompute import Recomputable, let_go, producer_of, saved


class _Kept(NamedTuple):
    result: Tensor
    """Which needs a gradient if the first one did: that of layers that are frozen does not."""
    turns: int
    """How often a half gave way for it."""
    is_ahead: bool
    """Whether the half was ahead afterwards."""


class _Results(threading.local):
    """Results of the block that is being computed in this thread, of each half of the batch if they take turns: where
    to add one, or where to take one from."""

    kept: dict[int, list[_Kept]] | None = None
    taken: dict[int, Iterator[_Kept]] | None = None


_results = _Results()


class _Setting(AbstractContextManager[None]):
    """A time in which an attribute of this thread's results has what ``value`` returns; it may be entered again."""

    def __init__(self, name: str, value: Callable[[], Any]) -> None:
        self.name, self.value = name, value

    def __enter__(self) -> None:
        self.before = getattr(_results, self.name)
        setattr(_results, self.name, self.value())

    def __exit__(self, *error: object) -> None:
        setattr(_results, self.name, self.before)


def kept_reductions() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for the forward of a block and for its recomputation, in which :func:`reduction` keeps and takes.

    They are what ``torch.utils.checkpoint``'s ``context_fn`` is to return, by themselves or with others around them.
    """
    results: dict[int, list[_Kept]] = {}
    taken: Callable[[], Any] = lambda: {half: iter(kept) for half, kept in results.items()}  # noqa: E731
    return _Setting("kept", lambda: results), _Setting("taken", taken)


def reduction(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, a sum over the ranks, or its result from the first time this block was computed.

    Args:
        function: What computes the sum. It must keep nothing for the backward but ``inputs``, which it then need not
            keep itself.
        inputs: ``(..., n)``, what the backward needs and the recomputation therefore has to provide.
    """
    keeping = _results.kept is not None or _results.taken is not None
    if torch.compiler.is_compiling() or not keeping or not all(x.requires_grad for x in inputs):
        return function(*inputs)
    inputs = tuple(x if producer_of(x) is not None else _Keep.apply(x) for x in inputs)
    half = current_half() or Half(0, 0, 0)
    if _results.taken is not None:
        kept = next(_results.taken[half.index])
        for _ in range(kept.turns):  # as the first time, so that the halves keep what they keep in the same order
            give_way()
        half.is_ahead = kept.is_ahead
        return kept.result.detach().requires_grad_(kept.result.requires_grad)
    before = half.turns
    result = function(*inputs)
    assert _results.kept is not None
    kept = _Kept(result.detach().requires_grad_(result.requires_grad), half.turns - before, half.is_ahead)
    _results.kept.setdefault(half.index, []).append(kept)
    return result


class _Keep(Recomputable):
    """Keeps a tensor, for the function that takes it next: what is recomputed is what was kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.version = x._version
        return x.view_as(x)

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        return saved(ctx)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        let_go(ctx)
        return grad
