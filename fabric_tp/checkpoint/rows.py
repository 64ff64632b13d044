"""Which rows of which tensors another one is made of, found out by letting a converter convert numbers for the rows.

Converters cut tensors apart and put them together, and never look at what is in them. Given a number for each row in
the place of the row, they say where each goes, so that nobody need repeat what they know, nor hold what they convert.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Rows that follow each other, in the tensor that they are read from and in the one that they are for."""

    name: str
    """Of the tensor that they are read from."""
    outer: tuple[int, ...]
    """Where in its dimensions but the last two."""
    first: int
    length: int
    to: int
    """The first of them in the tensor that they are for, with its dimensions but the last made one."""

    @property
    def rows(self) -> tuple[slice | int, ...]:
        """An index of the tensor that they are read from."""
        return (*self.outer, slice(self.first, self.first + self.length))


class Rows:
    """Numbers for the rows of tensors: no two have the same, and those of different matrices never follow each other.

    A row lies along the last dimension; of a tensor with one dimension each element is a row.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._tensors: list[tuple[str, tuple[int, ...], int]] = []
        self._next = 0

    def number(self, name: str, shape: torch.Size) -> Tensor:
        """Numbers of the rows of a tensor, ``shape[:-1]``, or ``shape`` of one that has no more than one dimension."""
        lead = tuple(shape[:-1]) if len(shape) > 1 else tuple(shape)
        outer, rows = lead[:-1], lead[-1] if lead else 1
        start = self._next
        self._starts.append(start)
        self._tensors.append((name, outer, rows))
        self._next += math.prod(outer) * (rows + 1)
        return _numbers(start, outer, rows).reshape(lead)

    def whole(self, numbers: Tensor) -> str | None:
        """The tensor whose rows these are, all of them, as they are."""
        if not numbers.numel():
            return None
        start = int(numbers.flatten()[0])
        index = bisect_right(self._starts, start) - 1
        name, outer, rows = self._tensors[index]
        own = _numbers(self._starts[index], outer, rows)
        return name if numbers.shape in (own.shape, ()) and torch.equal(numbers.reshape(own.shape), own) else None

    def runs(self, numbers: Tensor) -> Iterator[Run]:
        """The rows that have these numbers, in this order."""
        flat = numbers.reshape(-1)
        if not len(flat):
            return
        firsts = [0, *((flat[1:] != flat[:-1] + 1).nonzero().flatten() + 1).tolist(), len(flat)]
        for to, end in pairwise(firsts):
            number = int(flat[to])
            index = bisect_right(self._starts, number) - 1
            name, outer, rows = self._tensors[index]
            matrix, first = divmod(number - self._starts[index], rows + 1)
            yield Run(name, _unravel(matrix, outer), first, end - to, to)


def _numbers(start: int, outer: tuple[int, ...], rows: int) -> Tensor:
    count = math.prod(outer) * (rows + 1)
    return torch.arange(start, start + count).view(*outer, rows + 1)[..., :rows]


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    places = []
    for size in reversed(shape):
        index, place = divmod(index, size)
        places.append(place)
    return tuple(reversed(places))
