"""linear_cross_entropy equals the loss of whole logits in value and every gradient, and talks as often as it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fabric_tp
from fabric_tp.loss import chunks, formula
from tests.loss.counting import AG, AR, RS, Collectives
from tests.loss.examples import OPTIONS, REDUCTIONS, TOLERANCE, assert_equal, ignore_some, tensor_parallel
from tests.loss.linear_layers import (
    CHUNK,
    LAYOUTS,
    SHAPE,
    VOCABULARY,
    Inputs,
    assert_like_whole_logits,
    example,
    expected_gradients,
    fused,
    gradients,
    leaves,
    mine,
    random_like,
    whole,
)

LM_HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"with_bias": True},
    "softcap": {"softcap": 2.0},
    "bias and softcap": {"with_bias": True, "softcap": 2.0},
}
SIZES = [2, *(pytest.param(size, marks=pytest.mark.sweep) for size in (1, 4))]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_loss_of_whole_logits(pool, options, reduction, layout, size) -> None:
    targets = ignore_some(example()[1], **options)
    every = {**LM_HEADS["bias and softcap"], **options}
    pool(size)(assert_like_whole_logits, targets, layout, size, reduction=reduction, **every)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lm_head", LM_HEADS.values(), ids=LM_HEADS)
def test_lm_heads(pool, lm_head, layout, reduction) -> None:
    pool(2)(assert_like_whole_logits, ignore_some(example()[1]), layout, 2, reduction=reduction, **lm_head)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk_size", [1, 7, 24, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks(pool, layout, chunk_size, reduction) -> None:
    """Single rows, uneven ones, just all, and more than there are; none ignored."""
    targets = example()[1]
    pool(2)(assert_like_whole_logits, targets, layout, 2, chunk_size=chunk_size, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ignored(pool, layout, reduction) -> None:
    """A mean of nan, a sum of zero, and no gradient."""
    targets = torch.full(SHAPE, -100)
    pool(2)(assert_like_whole_logits, targets, layout, 2, reduction=reduction, with_bias=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_targets_on_one_rank(pool, layout) -> None:
    pool(2)(assert_like_whole_logits, torch.full(SHAPE, VOCABULARY - 1), layout, 2)


def loss_of_five(reduction: str, targets: Tensor, **options: Any) -> Callable[..., Tensor]:
    """Of hidden, weight and bias, five rows at a time."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fabric_tp.linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            softcap=2.0,
            reduction=reduction,  # type: ignore[arg-type]
            chunk_size=CHUNK,
            **options,
        )

    return loss


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options) -> None:
    inputs, targets = example(True)
    loss = loss_of_five("none", ignore_some(targets, **options), **options)
    assert torch.autograd.gradcheck(loss, leaves(inputs), fast_mode=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradient_of_the_sum_is_the_derivative(options) -> None:
    """In a random direction; gradcheck would go backward more than once."""
    inputs, targets = example(True)
    loss = loss_of_five("sum", ignore_some(targets, **options), **options)
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs if x is not None]

    def at(step: float) -> tuple[Tensor, Inputs]:
        moved = [x + step * d for x, d in zip(inputs, direction, strict=True) if x is not None]
        every = leaves((moved[0], moved[1], moved[2]))
        return loss(*every), every

    step = 1e-5
    difference = (at(step)[0] - at(-step)[0]) / (2 * step)
    slope = sum((g * d).sum() for g, d in zip(gradients(*at(0.0)), direction, strict=True))
    torch.testing.assert_close(slope, difference, rtol=1e-7, atol=1e-7)


def plain_weight_on_a_mesh() -> None:
    inputs, targets = example(True)
    hidden, weight, bias = mine(inputs, "replicate", 2)
    loss = fabric_tp.linear_cross_entropy(hidden, weight, targets, bias=bias, mesh=tensor_parallel(2))
    assert_equal(loss, whole(inputs, targets))


def test_plain_weight_on_a_mesh(pool) -> None:
    pool(2)(plain_weight_on_a_mesh)


def large_logits(size: int) -> None:
    inputs, targets = example(dtype=torch.float32)
    inputs = (inputs[0] * 1e4, inputs[1], None)
    parts = mine(inputs, "replicate", size)
    loss = fused(parts, targets, "replicate", size)
    assert_equal(loss, whole(inputs, targets), 1e-6)
    expected = expected_gradients(inputs, targets, "replicate", size)
    for grad, right in zip(gradients(loss, parts, random_like(loss)), expected, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_large_logits(pool, size) -> None:
    pool(size)(large_logits, size)


def test_a_rank_with_nothing_but_padding(pool) -> None:
    """Whose logits are minus infinity."""
    inputs, targets = example(True)
    assert inputs[2] is not None
    inputs[2][VOCABULARY // 2 :] = -torch.inf
    pool(2)(assert_like_whole_logits, targets % (VOCABULARY // 2), "replicate", 2, inputs=inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_exact_as_whole_logits(dtype) -> None:
    """Of a mean under a loss scale, as fp16 needs; the reference is fp64 on the same rounded inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs: Inputs = (
        torch.randn(512, 64, generator=generator).to(dtype),
        torch.randn(96, 64, generator=generator).div(8).to(dtype),
        None,
    )
    targets = torch.randint(96, (512,), generator=generator)

    def errors(loss_of: Callable[[Inputs], Tensor]) -> list[float]:
        given = leaves(inputs)
        pairs = zip(gradients(loss_of(given) * 1024, given), exact, strict=True)
        return [float((value.double() / 1024 - right).norm() / right.norm()) for value, right in pairs]

    double = leaves((inputs[0].double(), inputs[1].double(), None))
    exact = gradients(F.cross_entropy(F.linear(*double), targets), double)
    unfused = errors(lambda given: fabric_tp.cross_entropy(F.linear(*given), targets))
    chunked = errors(lambda given: fabric_tp.linear_cross_entropy(given[0], given[1], targets, chunk_size=64))
    assert all(mine < 2 * theirs for mine, theirs in zip(chunked, unfused, strict=True)), (chunked, unfused)


def test_autocast_like_a_linear_layer() -> None:
    inputs, targets = example(True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = fabric_tp.cross_entropy(F.linear(*inputs), targets)
        loss = fabric_tp.linear_cross_entropy(inputs[0], inputs[1], targets, bias=inputs[2])
    assert_equal(loss, expected, 1e-5)
    assert abs(float(loss - whole(inputs, targets))) > 1e-4


def count(layout: str, reduction: str, grad: bool, ignored: int) -> tuple[Counter[str], Counter[str]]:
    """Collectives of the forward and of the backward."""
    inputs, targets = example()
    targets.view(-1)[:ignored] = -100
    parts = mine(inputs, layout, 2)
    with Collectives() as forward, torch.set_grad_enabled(grad):
        loss = fused(parts, targets, layout, 2, reduction=reduction)
    with Collectives() as backward:
        if grad:
            loss.sum().backward()
    return forward.counts, backward.counts


@pytest.mark.parametrize(("ignored", "chunks"), [(0, 5), (3, 5), (9, 3), (24, 0)])
@pytest.mark.parametrize(("layout", "of_hidden"), [("replicate", {AR: 1}), ("sequence", {AG: 1, RS: 1})])
def test_collectives(pool, layout, of_hidden, ignored, chunks) -> None:
    """A small one for each chunk."""
    assert pool(2)(count, layout, "mean", True, ignored) == (Counter(of_hidden) + Counter({AG: chunks}), {})


def test_collectives_of_each_loss(pool) -> None:
    """One for all chunks; hidden rows are gathered again rather than kept."""
    assert pool(2)(count, "sequence", "none", True, 0) == ({AG: 2}, {AG: 1, RS: 1})


def test_collectives_without_gradients(pool) -> None:
    assert pool(2)(count, "replicate", "mean", False, 0) == ({AG: 1}, {})


def errors_without(dropped: str, layout: str, reduction: str) -> tuple[float, float]:
    """Of the loss, and of the gradient of hidden, when this collective returns what it is given, or a part of it."""
    inputs, targets = example()
    parts = mine(inputs, layout, 2)
    rank = tensor_parallel(2).get_local_rank()
    wrong: dict[str, tuple[Any, Callable[..., Tensor]]] = {
        "reduce": (chunks, lambda x, group: x),
        "reduce_scatter": (chunks, lambda x, group, dim: x.chunk(2, dim)[rank].clone()),
        "stack_over_ranks": (formula, lambda x, group: x[None]),
    }
    with mock.patch.object(wrong[dropped][0], dropped, wrong[dropped][1]) if dropped else mock.MagicMock():
        loss = fused(parts, targets, layout, 2, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, parts[0])
    every = leaves(inputs)
    right = whole(every, targets, reduction=reduction).sum()
    (expected,) = torch.autograd.grad(right, every[0])
    expected = expected.chunk(2, 1)[rank] if layout == "sequence" else expected
    return float((loss - right).abs()), float((grad - expected).abs().max())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("dropped", "layout"), [("reduce", "replicate"), ("reduce_scatter", "sequence")])
def test_notices_a_dropped_sum_of_the_input_gradient(pool, dropped, layout, reduction) -> None:
    assert max(pool(2)(errors_without, "", layout, reduction)) < TOLERANCE
    of_loss, of_gradient = pool(2)(errors_without, dropped, layout, reduction)
    assert of_loss < TOLERANCE
    assert of_gradient > 1e-3


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_notices_statistics_of_one_rank_only(pool, reduction) -> None:
    assert min(pool(2)(errors_without, "stack_over_ranks", "replicate", reduction)) > 1e-3


def test_second_backward_is_refused() -> None:
    """Gradients are handed out and not kept."""
    inputs, targets = example()
    hidden, weight, _ = leaves(inputs)
    loss = fabric_tp.linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
