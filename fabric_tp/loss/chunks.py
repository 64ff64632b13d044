"""Logits of a linear layer a chunk of rows at a time, all in the same memory, and gradients that come through them."""

from __future__ import annotations

import torch
from torch import Tensor

from fabric_tp import _torch
from fabric_tp.autograd.collectives import gather, reduce, reduce_scatter
from fabric_tp.loss.formula import Formula, wide
from fabric_tp.loss.targets import LocalTargets

Rows = slice | Tensor


class Chunks:
    """The rows whose target counts, and their logits.

    Args:
        hidden: ``(n, h)``, or this rank's ``(n/t, h)`` if they are to be gathered.
        weight: ``(v/t, h)``.
        bias: ``(v/t,)``.
        targets: ``(n,)``, in the order of the rows of all ranks one after the other.
        formula: Whose options count.
        gathers: Whether each rank is given its part of the rows only.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        formula: Formula,
        gathers: bool,
    ) -> None:
        self.hidden = gather(hidden, formula.vocabulary.group, 0) if gathers else hidden
        self.weight, self.formula, self.gathers = weight, formula, gathers
        self._bias, self._targets = bias, targets
        self.ignored = targets == formula.options.ignore_index
        self.rows = _split(self.ignored, formula.options.chunk_size)
        self.dtype = wide(weight.dtype)
        largest = min(formula.options.chunk_size, len(targets)) if self.rows else 0
        self._products = weight.new_empty(largest, len(weight))
        rounds = weight.dtype != self.dtype
        self._values = torch.empty_like(self._products, dtype=self.dtype) if rounds else None

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        return self.weight.new_zeros(shape, dtype=self.dtype)

    def locate(self, rows: Rows) -> LocalTargets:
        return self.formula.vocabulary.locate(self._targets[rows])

    def logits(self, x: Tensor, *, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """In fp32 or fp64, and the derivative of their softcapping."""
        products = self._products[: len(x)]
        if self._bias is None:
            torch.mm(x, self.weight.t(), out=products)
        else:
            torch.addmm(self._bias, x, self.weight.t(), out=products)
        values = products if self._values is None else self._values[: len(x)].copy_(products)
        softcap = self.formula.options.softcap
        if softcap is None:
            return values, None
        values.div_(softcap).tanh_()
        slope = values.square().neg_().add_(1) if with_slope else None
        return values.mul_(softcap), slope

    def rounded(self, gradient: Tensor) -> Tensor:
        """For the matrix products: in the dtype of the weight, where the logits were."""
        return gradient if self._values is None else self._products[: len(gradient)].copy_(gradient)


class Gradients:
    """Gradients of those of hidden, weight and bias that need one."""

    def __init__(self, needed: tuple[bool, ...], chunks: Chunks) -> None:
        self.chunks = chunks
        self.hidden = self.weight = self.bias = None
        if needed[0]:
            # Gathered rows are nobody else's: each chunk's gradient takes the place of its input.
            self.hidden = chunks.hidden if chunks.gathers else torch.empty_like(chunks.hidden)
        if needed[1]:
            self.weight = torch.zeros_like(chunks.weight)
        if needed[2]:
            self.bias = chunks.zeros((len(chunks.weight),))

    def add(self, rows: Rows, x: Tensor, of_values: Tensor, slope: Tensor | None) -> None:
        """What comes through the logits of the input ``x``, for the gradient of what softcapping made of them."""
        of_logits = self.chunks.rounded(of_values if slope is None else of_values.mul_(slope))
        if self.weight is not None:
            self.weight.addmm_(of_logits.t(), x)
        if self.bias is not None:
            self.bias += of_logits.sum(0, dtype=self.bias.dtype)
        if self.hidden is not None:
            if isinstance(rows, slice):
                torch.mm(of_logits, self.chunks.weight, out=self.hidden[rows])
            else:
                self.hidden[rows] = of_logits @ self.chunks.weight

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Each rank has the part of the hidden rows' gradient that comes from its columns."""
        hidden, group = self.hidden, self.chunks.formula.vocabulary.group
        if hidden is not None:
            hidden.masked_fill_(self.chunks.ignored[:, None], 0)
            hidden = reduce_scatter(hidden, group, 0) if self.chunks.gathers else reduce(hidden, group)
        bias = None if self.bias is None else self.bias.to(self.chunks.weight.dtype)
        return hidden, self.weight, bias


def _split(ignored: Tensor, size: int) -> list[Rows]:
    """Chunks of the rows that are not ignored."""
    total = len(ignored)
    rows = None if _torch.is_fake(ignored) else (~ignored).nonzero().squeeze(1)
    if rows is None or len(rows) == total:
        return [slice(start, min(start + size, total)) for start in range(0, total, size)]
    return list(rows.split(size)) if len(rows) else []
