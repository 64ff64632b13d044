"""The loss of logits that exist, each rank holding its columns.

Rows are turned to fp32 a chunk at a time, once in the forward and once in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fabric_tp.autograd.collectives import maximum_over_ranks, sum_over_ranks
from fabric_tp.loss.formula import Formula, Statistics, wide
from fabric_tp.loss.options import LossOptions
from fabric_tp.loss.targets import Vocabulary

CHUNK_ELEMENTS = 2**22
"""Logits that are turned into fp32 at a time, so that no fp32 copy of all of them exists."""
CHUNKS = 64
"""At most, however many logits there are: of small chunks the operations take longer to issue than to run."""


def vocab_parallel_loss(logits: Tensor, targets: Tensor, vocabulary: Vocabulary, options: LossOptions) -> Tensor:
    """The loss ``(...)`` or, reduced, ``()``.

    Args:
        logits: This rank's columns, ``(..., v/t)``, of any strides.
        targets: ``(...)``.
        vocabulary: Whose columns they are.
        options: Of the loss.
    """
    formula = Formula(vocabulary, options)
    losses = _VocabParallel.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), formula)
    return losses.view(targets.shape) if options.reduction == "none" else options.of_sum(losses.sum(), targets)


class _VocabParallel(Function):
    """The loss of each target; two small all-reduces in the forward, none in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, formula: Formula) -> Tensor:
        ignored, local = targets == formula.options.ignore_index, formula.vocabulary.locate(targets)
        maximum = maximum_over_ranks(logits.amax(-1).to(wide(logits.dtype)), formula.vocabulary.group)
        size = _chunk_size(logits)
        chunks = zip(logits.split(size), maximum[:, None].split(size), strict=True)
        exponentials, *totals = map(torch.cat, zip(*(formula.sums_(part - top) for part, top in chunks), strict=True))
        sums = torch.stack((exponentials, formula.target_logits(logits, local).to(maximum.dtype), *totals))
        sums = sum_over_ranks(sums, formula.vocabulary.group)
        losses = formula.loss(Statistics(maximum, *sums))
        # Not their logarithm: next to a large maximum it loses its digits.
        ctx.save_for_backward(logits, *local, ignored, maximum, sums[0])
        ctx.formula = formula
        return losses.masked_fill_(ignored, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, column, elsewhere, ignored, maximum, denominator = ctx.saved_tensors
        coefficients = ctx.formula.coefficients(grad.masked_fill(ignored, 0), maximum, denominator, elsewhere)
        result = torch.empty_like(logits)
        size = _chunk_size(logits)
        split = (each.split(size) for each in (result, logits, maximum[:, None], coefficients, column))
        for grads, part, top, factors, columns in zip(*split, strict=True):
            grads.copy_(ctx.formula.gradient_((part - top).exp_(), factors, columns))
        return result, None, None


def _chunk_size(logits: Tensor) -> int:
    """In rows. Of logits of less than fp32 the difference to an fp32 maximum is the first that is in fp32."""
    rows, columns = logits.shape
    return max(1, CHUNK_ELEMENTS // max(1, columns), -(-rows // CHUNKS))
