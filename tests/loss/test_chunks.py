"""linear_cross_entropy never has the logits of all rows, and multiplies no more than it must."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fabric_tp
from tests.loss.counting import Watch
from tests.loss.examples import REDUCTIONS
from tests.loss.linear_layers import LAYOUTS, SHAPE, VOCABULARY, WIDTH, example, fused, leaves, mine

ROWS, LONG_CHUNK = 64, 8


def watched(layout: str, reduction: str, ignored: int, chunk_size: int = LONG_CHUNK) -> tuple[int, int]:
    """Largest tensor and multiplications of loss and backward of 64 rows on 2 ranks."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, ROWS, WIDTH, generator=generator)
    weight = torch.randn(2 * VOCABULARY, WIDTH, generator=generator)
    targets = torch.randint(2 * VOCABULARY, (1, ROWS), generator=generator)
    targets[:, :ignored] = -100
    parts = mine((hidden, weight, None), layout, 2)
    with Watch() as watch:
        fused(parts, targets, layout, 2, reduction=reduction, chunk_size=chunk_size).sum().backward()
    return watch.largest, watch.multiplications


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tensor_of_rows_by_vocabulary(pool, layout, ignored, reduction) -> None:
    """Nothing is larger than the hidden rows, or than eight numbers for each row from each rank."""
    largest, _ = pool(2)(watched, layout, reduction, ignored)
    assert largest <= 8 * ROWS < ROWS * VOCABULARY


def test_a_tensor_of_rows_by_vocabulary_would_be_noticed(pool) -> None:
    largest, _ = pool(2)(watched, "replicate", "mean", 0, ROWS)
    assert largest == ROWS * VOCABULARY


@pytest.mark.parametrize(("reduction", "products"), [("mean", 3), ("sum", 3), ("none", 4)])
@pytest.mark.parametrize("ignored", [0, 3, 60])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrix_products_of_rows_that_count_only(pool, layout, ignored, reduction, products) -> None:
    _, multiplications = pool(2)(watched, layout, reduction, ignored)
    assert multiplications == products * (ROWS - ignored) * WIDTH * VOCABULARY


@pytest.mark.parametrize(("trained", "products"), [("", 1), ("hidden", 2), ("weight", 2), ("hidden weight", 3)])
def test_only_gradients_that_are_needed(trained, products) -> None:
    (hidden, weight, _), targets = example()
    hidden.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)
    with Watch() as watch:
        loss = fabric_tp.linear_cross_entropy(hidden, weight, targets)
        if trained:
            loss.backward()
    assert watch.multiplications == products * targets.numel() * weight.numel()
    assert [x.grad is not None for x in (hidden, weight)] == [name in trained for name in ("hidden", "weight")]


def test_without_gradients_no_work_for_them() -> None:
    inputs, targets = example()
    hidden, weight, _ = leaves(inputs)
    with torch.no_grad(), Watch() as watch:
        fabric_tp.linear_cross_entropy(hidden, weight, targets)
    assert watch.multiplications == targets.numel() * weight.numel()


def test_fake_tensors_have_no_values_to_look_at() -> None:
    """As where a step's memory is only counted; all rows count then."""
    with FakeTensorMode():
        hidden = torch.empty(*SHAPE, WIDTH, requires_grad=True)
        weight = torch.empty(VOCABULARY, WIDTH, requires_grad=True)
        with Watch() as watch:
            fabric_tp.linear_cross_entropy(hidden, weight, torch.empty(SHAPE, dtype=torch.int64)).backward()
    assert watch.multiplications == 3 * hidden.shape[:-1].numel() * weight.numel()
