"""The formula alone, of two ranks' columns in one process, in both ways to combine their statistics."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fabric_tp.autograd.collectives import Group
from fabric_tp.loss import formula
from fabric_tp.loss.formula import Formula, Statistics
from fabric_tp.loss.options import LossOptions
from fabric_tp.loss.targets import Vocabulary
from tests.loss.examples import OPTIONS, assert_equal, logits_and_targets, reference

COLUMNS = 12
DEFAULTS: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "reduction": "none"}
Combined = tuple[Statistics, list[Tensor | None]]
"""And the maximum of each rank, if it is its own."""


def formulas(columns: int, **options: Any) -> list[Formula]:
    """Of two ranks."""
    return [
        Formula(Vocabulary(2 * columns, Group("", 2, rank)), LossOptions(**{**DEFAULTS, **options})) for rank in (0, 1)
    ]


def agreed_maximum(ranks: list[Formula], parts: list[Tensor], targets: Tensor) -> Combined:
    """``parts``, the logits of each rank, become their exponentials."""
    maximum = torch.cat(parts, -1).amax(-1)
    each = list(zip(ranks, parts, strict=True))
    target = torch.stack([rank.target_logits(part, rank.vocabulary.locate(targets)) for rank, part in each]).sum(0)
    sums = [torch.stack(rank.sums_(part.sub_(maximum[:, None]))) for rank, part in each]
    denominator, *totals = sum(sums)
    return Statistics(maximum, denominator, target, *totals), [None, None]


def own_maxima(ranks: list[Formula], parts: list[Tensor], targets: Tensor) -> Combined:
    """``parts``, the logits of each rank, become their exponentials."""
    each = zip(ranks, parts, strict=True)
    own = torch.stack([rank.own_statistics_(part, rank.vocabulary.locate(targets)) for rank, part in each])
    with mock.patch.object(formula, "stack_over_ranks", return_value=own):
        return ranks[0].over_ranks(own[0]), list(own[:, 0])


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("combine", [agreed_maximum, own_maxima])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradient(options, combine, scale) -> None:
    """Of targets none of which is ignored, which is no matter of the formula."""
    logits, targets = logits_and_targets((9, 2 * COLUMNS), scale)
    grad = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = reference(logits.requires_grad_(), targets, reduction="none", **{**options, "ignore_index": -100})
    ranks = formulas(COLUMNS, **options)
    parts = [part.clone() for part in logits.detach().chunk(2, -1)]
    statistics, own = combine(ranks, parts, targets)
    assert_equal(ranks[0].loss(statistics), expected.detach())
    for rank, part, own_maximum in zip(ranks, parts, own, strict=True):
        column, elsewhere = rank.vocabulary.locate(targets)
        coefficients = rank.coefficients(grad, statistics.maximum, statistics.denominator, elsewhere, own_maximum)
        assert rank.gradient_(part, coefficients, column) is part
    assert_equal(torch.cat(parts, -1), torch.autograd.grad(expected, logits, grad)[0])


@pytest.mark.parametrize("combine", [agreed_maximum, own_maxima])
def test_no_exponential_overflows(combine) -> None:
    """On the rank that has not the largest logit either."""
    logits, targets = torch.tensor([[1e4, 0.0, -1e4, 5.0]]), torch.tensor([1])
    parts = [part.clone() for part in logits.chunk(2, -1)]
    ranks = formulas(2)
    statistics, _ = combine(ranks, parts, targets)
    assert_equal(ranks[0].loss(statistics), torch.tensor([1e4]))
    assert max(float(part.max()) for part in parts) == 1.0
