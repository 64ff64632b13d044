"""A tensor that a forward may measure, in the place of one that only linear layers are to see.

A hand-written attention likes to begin with ``B, T, C = x.size()`` and to end with ``y.view(B, T, C)``: the width of
its input stands for that of all its heads. On one of several ranks these are different numbers.
"""

from __future__ import annotations

from torch import Tensor

WHOLE = "stands_for"


def stand_in(x: Tensor, width: int) -> Tensor:
    """A tensor of that width; all else that a forward computes with it is NaN, and so does not go unnoticed."""
    measured = x.new_full((), float("nan")).expand(*x.shape[:-1], width)
    setattr(measured, WHOLE, x)
    return measured


def whole(x: Tensor) -> Tensor:
    """What ``x`` stands for."""
    return getattr(x, WHOLE, x)
