"""LM head and cross-entropy in one, a chunk of rows at a time: the arithmetic of ``linear_cross_entropy``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fabric_tp import _torch
from fabric_tp.autograd.collectives import Group, Layout, gather, reduce, reduce_scatter
from fabric_tp.loss.deferred import autocast

CHUNK_SIZE = 1024
"""Rows whose logits exist at a time: so many that computing matrix products takes longer than reading the weight."""

LocalRows = slice | Tensor


@dataclass(frozen=True, kw_only=True)
class LinearLoss:
    """What to compute; the options are those of :func:`fabric_tp.cross_entropy`."""

    group: Group | None
    columns: int
    """Of the vocabulary, on each rank."""
    layout: Layout
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    chunk_size: int

    @property
    def ranks(self) -> int:
        return self.group.size if self.group else 1

    @property
    def vocabulary(self) -> int:
        return self.columns * self.ranks

    @property
    def gathers(self) -> bool:
        """Whether each rank is given its part of the rows only."""
        return self.layout == "sequence" and self.ranks > 1


def linear_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: LinearLoss, *, summed: bool
) -> Tensor:
    """The loss of each target, or their sum.

    Args:
        hidden: ``(n, h)``, or this rank's ``(n/t, h)`` under the layout ``"sequence"``.
        weight: ``(v/t, h)``.
        bias: ``(v/t,)``.
        targets: ``(n,)``, in the order of the rows of all ranks one after the other.
    """
    hidden, weight, bias = (autocast(x) for x in (hidden, weight, bias))
    with torch.autocast(hidden.device.type, enabled=False):
        if summed:
            return _Summed.apply(hidden, weight, bias, targets, spec, torch.is_grad_enabled())
        return _PerTarget.apply(hidden, weight, bias, targets, spec)


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
        spec: LinearLoss,
        grad_enabled: bool,
    ) -> Tensor:
        if not grad_enabled or not any(ctx.needs_input_grad):
            losses, _ = _losses(hidden, weight, bias, targets, spec)
            return losses.sum()
        chunks = _Chunks(hidden, weight, bias, targets, spec)
        gradients = _Gradients(ctx.needs_input_grad, chunks)
        total = chunks.zeros(())
        for rows in chunks.rows:
            x, target = chunks.hidden[rows], chunks.target(rows)
            values, slope = chunks.logits(x, with_slope=True)
            mine = _statistics_(values, target, spec)
            over_all = _over_all_ranks(mine, spec)
            total += _loss(over_all, spec).sum()
            ones = torch.ones_like(mine[0])
            _gradient_(values, slope, target, mine[0], over_all, ones, spec)
            gradients.add(rows, x, chunks.rounded(values))
        ctx.any_targets = bool(chunks.rows)
        ctx.save_for_backward(*gradients.finish())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The mean over no targets passes an infinite gradient.
        gradients = [g if g is None or not ctx.any_targets else g.mul_(grad) for g in ctx.saved_tensors]
        return (*gradients, None, None, None)


class _PerTarget(Function):
    """The loss of each target. Their gradients are known in the backward only, which computes the logits again.

    One small all-gather for all rows, in the forward; a fourth matrix product in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: LinearLoss
    ) -> Tensor:
        losses, statistics = _losses(hidden, weight, bias, targets, spec)
        ctx.save_for_backward(hidden, weight, bias, targets, statistics)
        ctx.spec = spec
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, statistics = ctx.saved_tensors
        spec: LinearLoss = ctx.spec
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = _Chunks(hidden, weight, bias, targets, spec)
            gradients = _Gradients(ctx.needs_input_grad, chunks)
            for rows in chunks.rows:
                x, target, over_all = chunks.hidden[rows], chunks.target(rows), statistics[:, rows]
                values, slope = chunks.logits(x, with_slope=True)
                maximum = over_all[0]
                values.sub_(maximum[:, None]).exp_()
                _gradient_(values, slope, target, maximum, over_all, grad[rows], spec)
                gradients.add(rows, x, chunks.rounded(values))
        return (*gradients.finish(), None, None)


def _losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: LinearLoss
) -> tuple[Tensor, Tensor]:
    """The loss of each target ``(n,)``, zero where it is ignored, and the statistics ``(4, n)`` of its row."""
    chunks = _Chunks(hidden, weight, bias, targets, spec)
    losses = chunks.zeros(targets.shape)
    statistics = chunks.zeros((4, len(targets)))
    for rows in chunks.rows:
        values, _ = chunks.logits(chunks.hidden[rows], with_slope=False)
        statistics[:, rows] = _statistics_(values, chunks.target(rows), spec)
    if chunks.rows:
        statistics = _over_all_ranks(statistics, spec)
        for rows in chunks.rows:
            losses[rows] = _loss(statistics[:, rows], spec)
    return losses, statistics


@dataclass(frozen=True)
class _Target:
    """Where the targets of some rows are among this rank's columns."""

    column: Tensor
    elsewhere: Tensor


class _Chunks:
    """The rows that count, and their logits a chunk at a time, all chunks in the same memory."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: LinearLoss) -> None:
        self.gathered = spec.gathers
        self.hidden = gather(hidden, spec.group, 0) if spec.gathers else hidden  # type: ignore[arg-type]
        self.weight, self.bias, self.targets, self.spec = weight, bias, targets, spec
        self.ignored = targets == spec.ignore_index
        self.rows = _split(self.ignored, spec.chunk_size)
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        largest = min(spec.chunk_size, len(targets)) if self.rows else 0
        self._products = weight.new_empty(largest, spec.columns)
        rounds = weight.dtype != self.dtype
        self._values = torch.empty_like(self._products, dtype=self.dtype) if rounds else None

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        return self.weight.new_zeros(shape, dtype=self.dtype)

    def target(self, rows: LocalRows) -> _Target:
        columns = self.spec.columns
        local = self.targets[rows] - (columns * self.spec.group.rank if self.spec.group else 0)
        elsewhere = (local < 0) | (local >= columns)
        return _Target(local.masked_fill_(elsewhere, 0), elsewhere)

    def logits(self, x: Tensor, *, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """In fp32 or fp64, and the derivative of their softcapping."""
        products = self._products[: len(x)]
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=products)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=products)
        values = products if self._values is None else self._values[: len(x)].copy_(products)
        if self.spec.softcap is None:
            return values, None
        values.div_(self.spec.softcap).tanh_()
        slope = values.square().neg_().add_(1) if with_slope else None
        return values.mul_(self.spec.softcap), slope

    def rounded(self, gradient: Tensor) -> Tensor:
        """For the matrix products: in the dtype of the weight, where the logits were."""
        return gradient if self._values is None else self._products[: len(gradient)].copy_(gradient)


class _Gradients:
    """Gradients of those of hidden, weight and bias that need one."""

    def __init__(self, needed: tuple[bool, ...], chunks: _Chunks) -> None:
        self.chunks = chunks
        self.hidden = self.weight = self.bias = None
        if needed[0]:
            # Gathered rows are nobody else's: each chunk's gradient takes the place of its input.
            self.hidden = chunks.hidden if chunks.gathered else torch.empty_like(chunks.hidden)
        if needed[1]:
            self.weight = torch.zeros_like(chunks.weight)
        if needed[2]:
            self.bias = chunks.zeros((len(chunks.weight),))

    def add(self, rows: LocalRows, x: Tensor, of_logits: Tensor) -> None:
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
        spec, hidden = self.chunks.spec, self.hidden
        if hidden is not None:
            hidden.masked_fill_(self.chunks.ignored[:, None], 0)
            if spec.group:
                hidden = reduce_scatter(hidden, spec.group, 0) if spec.gathers else reduce(hidden, spec.group)
        bias = None if self.bias is None else self.bias.to(self.chunks.weight.dtype)
        return hidden, self.weight, bias


def _split(ignored: Tensor, size: int) -> list[LocalRows]:
    """Chunks of the rows that are not ignored."""
    total = len(ignored)
    rows = None if _torch.is_fake(ignored) else (~ignored).nonzero().squeeze(1)
    if rows is None or len(rows) == total:
        return [slice(start, min(start + size, total)) for start in range(0, total, size)]
    return list(rows.split(size)) if len(rows) else []


def _statistics_(values: Tensor, target: _Target, spec: LinearLoss) -> Tensor:
    """Of this rank's columns: maximum; sum of exponentials; target's logit or 0; sum, if it counts; ``(4, rows)``.

    The sums are of logits less the maximum. ``values`` become the exponentials.
    """
    # Of columns that are all minus infinity, as some padding is, the exponentials are 0 and not nan.
    maximum = values.amax(-1).clamp_(min=torch.finfo(values.dtype).min)
    target_logit = values.gather(1, target.column[:, None]).squeeze(1).masked_fill_(target.elsewhere, 0)
    values.sub_(maximum[:, None])
    total = values.sum(-1) if spec.label_smoothing else torch.zeros_like(maximum)
    values.exp_()
    return torch.stack((maximum, values.sum(-1), target_logit, total))


def _over_all_ranks(statistics: Tensor, spec: LinearLoss) -> Tensor:
    """The statistics of the whole vocabulary; the target's logit is then less the maximum, too."""
    if spec.group and spec.group.size > 1:
        statistics = _torch.all_gather(statistics, spec.group.size, spec.group.name)
    maxima, sums, target_logits, totals = statistics.view(-1, 4, statistics.shape[-1]).unbind(1)
    maximum = maxima.amax(0)
    below = maxima - maximum
    total = (totals + spec.columns * below).sum(0) if spec.label_smoothing else totals[0]
    return torch.stack((maximum, (sums * below.exp()).sum(0), target_logits.sum(0) - maximum, total))


def _loss(statistics: Tensor, spec: LinearLoss) -> Tensor:
    maximum, sums, target_logit, total = statistics
    log_sum = sums.log()
    loss = log_sum - (1 - spec.label_smoothing) * target_logit
    if spec.label_smoothing:
        loss -= spec.label_smoothing / (spec.vocabulary) * total
    return loss + spec.z_loss * (log_sum + maximum).square() if spec.z_loss else loss


def _gradient_(
    exponentials: Tensor,
    slope: Tensor | None,
    target: _Target,
    maximum: Tensor,
    over_all: Tensor,
    grad: Tensor,
    spec: LinearLoss,
) -> None:
    """Turn ``exp(logits - maximum)`` into the gradient of the logits for ``grad``, the gradient of each row's loss."""
    log_z = over_all[0] + over_all[1].log()
    exponentials *= (grad * (1 + 2 * spec.z_loss * log_z) * (maximum - over_all[0]).exp() / over_all[1])[:, None]
    if spec.label_smoothing:
        exponentials -= (spec.label_smoothing / (spec.vocabulary) * grad)[:, None]
    of_target = (-(1 - spec.label_smoothing) * grad).masked_fill(target.elsewhere, 0)
    exponentials.scatter_add_(1, target.column[:, None], of_target[:, None])
    if slope is not None:
        exponentials *= slope
