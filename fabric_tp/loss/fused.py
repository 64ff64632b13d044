"""Logits that are computed for their loss, a chunk of rows at a time, from the input and the weight of an LM head.

Logits exist for ``chunk_size`` rows at a time, in one buffer of the weight's dtype and one of fp32, which then hold
their gradients. Rows whose target is ignored are not computed. Beyond these buffers and the gradients there is nothing
of the size of the input but, under the layout ``"sequence"``, the gathered input, whose place its gradient takes.
Gradients are computed together with the loss: three matrix products as without the fusion (four for
``reduction="none"``, whose gradient is not known before the backward), and the sum over the ranks of the input's
gradient is part of the forward. Hsu et al., "Liger Kernel" (2024), has linear layer and loss in one, chunked, with
gradients in the forward.

=========  =============================  ==============================================================
layout     hidden                         collectives
=========  =============================  ==============================================================
replicate  (..., h), the same everywhere  a small all-gather for each chunk; all-reduce of the gradient
                                          of hidden
sequence   (b, s/t, h)                    all-gather; the small ones; reduce-scatter
=========  =============================  ==============================================================

With ``reduction="none"``, and where no gradient is needed, there is one small all-gather for all chunks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fabric_tp.autograd.collectives import SEQUENCE_DIM, Layout
from fabric_tp.autograd.padding import rows_to_fill
from fabric_tp.loss.chunks import Chunks, Gradients
from fabric_tp.loss.deferred import DeferredLogits, autocast
from fabric_tp.loss.formula import Formula, Statistics
from fabric_tp.loss.options import LossOptions
from fabric_tp.loss.targets import Vocabulary


def deferred_loss(logits: DeferredLogits, targets: Tensor, options: LossOptions) -> Tensor:
    """As :func:`linear_loss`, of the LM head's call; rows that were not selected have no target."""
    call, rows = logits.used(), logits.rows
    every = targets
    if rows is not None:
        every = targets.new_full(call.shape[:-1], options.ignore_index)
        every.view(-1)[rows] = targets
    options = replace(options, softcap=logits.softcap)
    vocabulary = Vocabulary(call.vocabulary, call.group)
    losses = linear_loss(call.hidden, call.weight, call.bias, every, vocabulary, call.layout, options)
    return losses if rows is None or options.reduction != "none" else losses.flatten()[rows]


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    vocabulary: Vocabulary,
    layout: Layout,
    options: LossOptions,
) -> Tensor:
    """The loss ``(...)`` or, reduced, ``()``.

    Args:
        hidden: ``(..., h)``, or this rank's ``(b, s/t, h)`` under the layout ``"sequence"``.
        weight: ``(v/t, h)``.
        bias: ``(v/t,)``.
        targets: ``(...)`` or ``(b, s)``, whole.
        vocabulary: Whose columns the weight makes.
        layout: Of ``hidden``.
        options: Of the loss.
    """
    formula, group = Formula(vocabulary, options), vocabulary.group
    gathers = layout == "sequence" and group.size > 1
    by_rank = targets
    if gathers:  # the rows of each rank one after the other, as a gather without copies leaves them
        padding = rows_to_fill(targets.shape[SEQUENCE_DIM], group.size)
        filled = F.pad(targets, (0, padding), value=options.ignore_index)
        by_rank = filled.unflatten(SEQUENCE_DIM, (group.size, -1)).movedim(SEQUENCE_DIM, 0)
    rows = hidden.reshape(-1, hidden.shape[-1])
    inputs = (*(autocast(x) for x in (rows, weight, bias)), by_rank.reshape(-1), formula, gathers)
    with torch.autocast(hidden.device.type, enabled=False):
        if options.reduction != "none":
            return options.of_sum(_Summed.apply(*inputs, torch.is_grad_enabled()), targets)
        losses = _PerTarget.apply(*inputs).view(by_rank.shape)
    if not gathers:
        return losses
    return losses.movedim(0, SEQUENCE_DIM).flatten(SEQUENCE_DIM, SEQUENCE_DIM + 1)[:, : targets.shape[SEQUENCE_DIM]]


class _Summed(Function):
    """The sum of the losses; its gradients are computed in the forward, while a chunk's logits exist.

    Three matrix products, none twice. Each chunk needs the softmax denominator over all ranks before its gradients, so
    there is one small all-gather for each chunk (four numbers for each row from each rank), which costs far less than
    computing all logits a second time would (a fourth matrix product) to have one all-gather for all chunks.

    Gradients are of the sum: what the loss is multiplied with (a loss scale, one over the number of targets) comes in
    the backward, so that it makes nothing underflow here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        formula: Formula,
        gathers: bool,
        grad_enabled: bool,
    ) -> Tensor:
        if not grad_enabled or not any(ctx.needs_input_grad):
            return _losses(hidden, weight, bias, targets, formula, gathers)[0].sum()
        chunks = Chunks(hidden, weight, bias, targets, formula, gathers)
        gradients = Gradients(ctx.needs_input_grad, chunks)
        total = chunks.zeros(())
        for rows in chunks.rows:
            x, local = chunks.hidden[rows], chunks.locate(rows)
            values, slope = chunks.logits(x, with_slope=True)
            own = formula.own_statistics_(values, local)
            statistics = formula.over_ranks(own)
            total += formula.loss(statistics).sum()
            gradient = formula.gradient_(
                values,
                formula.coefficients(torch.ones_like(own[0]), *statistics[:2], local.elsewhere, own_maximum=own[0]),
                local.column,
            )
            gradients.add(rows, x, gradient, slope)
        ctx.any_targets = bool(chunks.rows)
        ctx.save_for_backward(*gradients.finish())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The mean over no targets passes an infinite gradient.
        gradients = [g if g is None or not ctx.any_targets else g.mul_(grad) for g in ctx.saved_tensors]
        return (*gradients, None, None, None, None)


class _PerTarget(Function):
    """The loss of each target. Their gradients are known in the backward only, which computes the logits again.

    One small all-gather for all rows, in the forward; a fourth matrix product in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, formula: Formula, gathers: bool
    ) -> Tensor:
        losses, statistics = _losses(hidden, weight, bias, targets, formula, gathers)
        ctx.save_for_backward(hidden, weight, bias, targets, statistics.maximum, statistics.denominator)
        ctx.formula, ctx.gathers = formula, gathers
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, maximum, denominator = ctx.saved_tensors
        formula: Formula = ctx.formula
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = Chunks(hidden, weight, bias, targets, formula, ctx.gathers)
            gradients = Gradients(ctx.needs_input_grad, chunks)
            for rows in chunks.rows:
                x, local = chunks.hidden[rows], chunks.locate(rows)
                values, slope = chunks.logits(x, with_slope=True)
                values.sub_(maximum[rows, None]).exp_()
                coefficients = formula.coefficients(grad[rows], maximum[rows], denominator[rows], local.elsewhere)
                gradients.add(rows, x, formula.gradient_(values, coefficients, local.column), slope)
        return (*gradients.finish(), None, None, None)


def _losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, formula: Formula, gathers: bool
) -> tuple[Tensor, Statistics]:
    """The loss of each target ``(n,)``, zero where it is ignored."""
    chunks = Chunks(hidden, weight, bias, targets, formula, gathers)
    own = chunks.zeros((4, len(targets)))
    for rows in chunks.rows:
        values, _ = chunks.logits(chunks.hidden[rows], with_slope=False)
        own[:, rows] = formula.own_statistics_(values, chunks.locate(rows))
    statistics = formula.over_ranks(own) if chunks.rows else Statistics(*own)
    return formula.loss(statistics).masked_fill_(chunks.ignored, 0), statistics
