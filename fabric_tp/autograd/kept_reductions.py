"""Reductions in a block that is computed again in the backward: their results are kept, and what made them is not run.

``torch.utils.checkpoint`` can keep the results of single operators. A reduction's result would not save the matrix
product before it from running again, for nothing; here both are left out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fabric_tp.autograd.recompute import Remakes, maker_of, saved


class _Pass(threading.local):
    """The results of the block that is being computed in this thread: added to one, or taken from one."""

    kept: list[Tensor] | None = None
    taken: Iterator[Tensor] | None = None


_pass = _Pass()


class _Setting(AbstractContextManager[None]):
    """Within it, an attribute of this thread's pass has what ``value`` returns; it may be entered again."""

    def __init__(self, name: str, value: Callable[[], Any]) -> None:
        self.name, self.value = name, value

    def __enter__(self) -> None:
        self.before = getattr(_pass, self.name)
        setattr(_pass, self.name, self.value())

    def __exit__(self, *error: object) -> None:
        setattr(_pass, self.name, self.before)


def kept_reductions() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for the forward of a block and for its recomputation, in which :func:`reduction` keeps and takes."""
    results: list[Tensor] = []
    return _Setting("kept", lambda: results), _Setting("taken", lambda: iter(results))


def reduction(make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``make(*inputs)``, a sum over the ranks, or its result from the first time this block was computed.

    Args:
        make: Must keep nothing for the backward but ``inputs``, which it then need not keep itself.
        inputs: What the backward needs, and the recomputation therefore has to provide.
    """
    keeping = _pass.kept is not None or _pass.taken is not None
    if torch.compiler.is_compiling() or not keeping or not all(x.requires_grad for x in inputs):
        return make(*inputs)
    inputs = tuple(x if maker_of(x) is not None else _Keep.apply(x) for x in inputs)
    if _pass.taken is not None:
        return next(_pass.taken).detach().requires_grad_()
    result = make(*inputs)
    assert _pass.kept is not None
    _pass.kept.append(result.detach())
    return result


class _Keep(Remakes):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def remake(ctx: Any) -> Tensor:
        return saved(ctx)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        ctx.held = None
        return grad
