"""Sequences that the ranks do not divide: the last of their parts are filled up with rows that nobody sees.

Each rank has ``ceil(s / t)`` rows. A reduce-scatter or a scatter adds zeros to the whole sequence before it is divided,
and a gather cuts them off again; so do their backwards, the other way round. Between them every module sees each row by
itself, and since nothing that is computed from the padding is looked at, its gradient is zero.

Only a gather cannot see in its input how many rows are padding. A model's :class:`Padding` tells it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from fabric_tp import _torch


class Padding:
    """How many rows fill up the sequence of the model's forward that is running."""

    def __init__(self) -> None:
        self._rows = 0
        self._seen: set[int] = set()  # by all forwards so far: where it is one number, a recomputation needs no memory
        self._recomputed = False  # whether it is known which forward is computed again

    def note(self, length: int, ranks: int) -> None:
        """A forward begins to divide a sequence of this length."""
        self._rows = rows_to_fill(length, ranks)
        if not torch.compiler.is_compiling():
            self._seen.add(self._rows)

    @property
    def rows(self) -> int:
        """Their number.

        Raises:
            ValueError: Activations are computed again, not by this package, and of which forward nobody knows.
        """
        unknown = not torch.compiler.is_compiling() and len(self._seen) > 1 and not self._recomputed
        if unknown and _torch.current_backward() != -1:
            raise ValueError(
                "Activations are computed again in the backward, for sequences of lengths that tensor_parallel_size"
                " divides and of others, and which of them these are is not known. Let fabric_tp do it, with"
                " activation_checkpointing='full', or pad all batches to a multiple of tensor_parallel_size."
            )
        return self._rows

    def recomputation(self) -> AbstractContextManager[None]:
        """A time, later, in which what has this padding now is computed again; it may be entered again."""
        return _Recomputation(self, self.rows)


class _Recomputation(AbstractContextManager[None]):
    def __init__(self, padding: Padding, rows: int) -> None:
        self.padding, self.rows = padding, rows

    def __enter__(self) -> None:
        self.before = self.padding._rows, self.padding._recomputed
        self.padding._rows, self.padding._recomputed = self.rows, True

    def __exit__(self, *error: object) -> None:
        self.padding._rows, self.padding._recomputed = self.before


def rows_to_fill(length: int, ranks: int) -> int:
    """What is missing to the next multiple."""
    return int(-length % ranks)


def fill(x: Tensor, dim: int, ranks: int) -> Tensor:
    """``(..., s, ...)`` -> ``(..., s + p, ...)`` with zeros at the end, so that the ranks divide it."""
    rows = rows_to_fill(x.shape[dim], ranks)
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, rows)) if rows else x


def cut(x: Tensor, dim: int, rows: int) -> Tensor:
    """``(..., s + p, ...)`` -> ``(..., s, ...)``"""
    return x.narrow(dim, 0, x.shape[dim] - rows).clone(memory_format=torch.contiguous_format) if rows else x
