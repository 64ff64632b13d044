"""The loss of a row of logits and its gradient, from four numbers of the row.

Of a row x of v logits with the target c, with a for ``label_smoothing``, z for ``z_loss`` and
``lse = log(sum(exp(x)))``::

    loss          =  lse - (1 - a) x[c] - a mean(x) + z lse**2
    its gradient  =  (1 + 2 z lse) softmax(x) - (1 - a) onehot(c) - a / v

With m the largest logit, the row's numbers are m, ``s = sum(exp(x - m))``, ``x[c]`` and ``sum(x - m)``. Then
``lse = m + log(s)`` and ``softmax(x) = exp(x - m) / s``, where no exponential is above 1.

Each rank has the numbers of its columns. They become those of all columns in one of two ways:

- the ranks agree on m before there are exponentials, and add up the rest after them: two collectives (Shoeybi et al.,
  "Megatron-LM" (2019), section 3);
- each rank takes its own m, for which :meth:`Formula.over_ranks` makes up: one collective (Milakov and Gimelshein,
  "Online normalizer calculation for softmax" (2018), section 3.1).

Label smoothing: Szegedy et al., "Rethinking the Inception Architecture" (2016), section 7. z-loss: Chowdhery et al.,
"PaLM" (2022), section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fabric_tp.autograd.collectives import stack_over_ranks
from fabric_tp.loss.options import LossOptions
from fabric_tp.loss.targets import LocalTargets, Vocabulary


class Statistics(NamedTuple):
    """The numbers of each row, ``(n,)`` each."""

    maximum: Tensor
    denominator: Tensor
    """Of the softmax: the sum of the exponentials of the logits less the maximum."""
    target: Tensor
    """The target's logit; 0 where it is another rank's."""
    total: Tensor | None = None
    """Sum of the logits less the maximum; without label smoothing it does not count."""


class Coefficients(NamedTuple):
    """What makes a row's exponentials its gradient, ``(n,)`` each."""

    of_exponentials: Tensor
    of_target: Tensor
    """To be added to the target's column; 0 where that is another rank's."""
    of_all: Tensor | None
    """To be added to all columns; None without label smoothing."""

    def split(self, size: int) -> list[Coefficients]:
        """For so many rows at a time."""
        exponentials, targets = self.of_exponentials.split(size), self.of_target.split(size)
        of_all = [None] * len(targets) if self.of_all is None else self.of_all.split(size)
        return [Coefficients(*parts) for parts in zip(exponentials, targets, of_all, strict=True)]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the loss of logits of this dtype is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Formula:
    """With these options, over this vocabulary. Logits are this rank's columns ``(n, v/t)``, in a wide dtype."""

    vocabulary: Vocabulary
    options: LossOptions

    def target_logits(self, logits: Tensor, targets: LocalTargets) -> Tensor:
        """``(n,)``, in the dtype of the logits, which may be any; 0 for the targets of other ranks."""
        return logits.gather(1, targets.column[:, None]).squeeze(1).masked_fill_(targets.elsewhere, 0)

    def sums_(self, shifted: Tensor) -> tuple[Tensor, ...]:
        """Of the exponentials of logits less a maximum, ``(n,)``, and of the latter themselves, if those count.

        ``shifted``, the logits less a maximum, become the exponentials.
        """
        totals = (shifted.sum(-1),) if self.options.label_smoothing else ()
        return shifted.exp_().sum(-1), *totals

    def own_statistics_(self, logits: Tensor, targets: LocalTargets) -> Tensor:
        """:class:`Statistics` ``(4, n)`` of this rank's columns, with their own maximum.

        ``logits`` become the exponentials of the logits less that maximum.
        """
        # Of columns that are all minus infinity, as some padding is, the exponentials are 0 and not nan.
        maximum = logits.amax(-1).clamp_(min=torch.finfo(logits.dtype).min)
        target = self.target_logits(logits, targets)
        denominator, *totals = self.sums_(logits.sub_(maximum[:, None]))
        return torch.stack((maximum, denominator, target, *(totals or (torch.zeros_like(maximum),))))

    def over_ranks(self, own: Tensor) -> Statistics:
        """Of all columns, from ``(4, n)`` of each rank's; one all-gather."""
        maxima, denominators, targets, totals = stack_over_ranks(own, self.vocabulary.group).unbind(1)
        maximum = maxima.amax(0)
        below = maxima - maximum
        total = None
        if self.options.label_smoothing:
            columns = [self.vocabulary.columns(rank) for rank in range(len(below))]
            total = (totals + below.new_tensor(columns)[:, None] * below).sum(0)
        return Statistics(maximum, (denominators * below.exp()).sum(0), targets.sum(0), total)

    def loss(self, statistics: Statistics) -> Tensor:
        """``(n,)``, from the numbers of all columns."""
        log_sum = statistics.denominator.log()
        loss = log_sum - (1 - self.options.label_smoothing) * (statistics.target - statistics.maximum)
        if statistics.total is not None:
            loss -= self.options.label_smoothing / self.vocabulary.size * statistics.total
        if self.options.z_loss:
            loss += self.options.z_loss * (log_sum + statistics.maximum).square()
        return loss

    def coefficients(
        self,
        grad: Tensor,
        maximum: Tensor,
        denominator: Tensor,
        elsewhere: Tensor,
        own_maximum: Tensor | None = None,
    ) -> Coefficients:
        """Of the gradient of the logits, all ``(n,)``.

        Args:
            grad: The gradient of each row's loss.
            maximum: Of all columns.
            denominator: Likewise.
            elsewhere: Of :class:`LocalTargets`.
            own_maximum: What this rank's exponentials are of the logits less, if that is not ``maximum``.
        """
        of_exponentials = grad * (1 + 2 * self.options.z_loss * (maximum + denominator.log()))
        if own_maximum is not None:
            of_exponentials *= (own_maximum - maximum).exp()
        of_target = (-(1 - self.options.label_smoothing) * grad).masked_fill_(elsewhere, 0)
        of_all = -self.options.label_smoothing / self.vocabulary.size * grad if self.options.label_smoothing else None
        return Coefficients(of_exponentials / denominator, of_target, of_all)

    def gradient_(self, exponentials: Tensor, coefficients: Coefficients, column: Tensor) -> Tensor:
        """Turn the exponentials of logits less a maximum into the gradient of the logits."""
        exponentials *= coefficients.of_exponentials[:, None]
        if coefficients.of_all is not None:
            exponentials += coefficients.of_all[:, None]
        return exponentials.scatter_add_(1, column[:, None], coefficients.of_target[:, None])
