"""cross_entropy equals torch's in value and gradient, of sharded and of plain logits."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

import fabric_tp
from fabric_tp._torch import OperationMode
from fabric_tp.loss import vocab_parallel
from fabric_tp.measure.memory import MemoryTracker
from fabric_tp.shards import gather_shards
from fabric_tp.testing.ranks import mesh
from tests.loss.counting import AR, Collectives
from tests.loss.examples import (
    OPTIONS,
    REDUCTIONS,
    TOLERANCE,
    assert_equal,
    ignore_some,
    logits_and_targets,
    reference,
    tensor_parallel,
)
from tests.models import LENGTH, VOCABULARY, build

SHAPES = [(8, 24), (3, 8, 24), (2, 3, 4, 24)]
SIZES = [2, *(pytest.param(size, marks=pytest.mark.sweep) for size in (1, 4))]


def shard(logits: Tensor, size: int) -> tuple[Tensor, DTensor]:
    """This rank's columns, a leaf, and the DTensor of them."""
    axis = tensor_parallel(size)
    local = logits.detach().chunk(size, -1)[axis.get_local_rank()].clone().requires_grad_()
    return local, DTensor.from_local(local, axis, [Shard(logits.dim() - 1)], run_check=False)


def assert_like_reference(logits: Tensor, targets: Tensor, size: int | None, **options: Any) -> None:
    """Value, and gradient for a random gradient of the loss; ``size`` None for plain logits."""
    expected_logits = logits.detach().clone().requires_grad_()
    expected = reference(expected_logits, targets, **options)
    leaf, given = shard(logits, size) if size else (plain := logits.detach().clone().requires_grad_(), plain)
    loss = fabric_tp.cross_entropy(given, targets, **options)
    assert type(loss) is Tensor
    assert_equal(loss, expected)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected.backward(grad)
    loss.backward(grad)
    assert expected_logits.grad is not None
    assert leaf.grad is not None
    rank = tensor_parallel(size).get_local_rank() if size else 0
    assert_equal(leaf.grad, expected_logits.grad.chunk(size or 1, -1)[rank])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sharded(pool, options, reduction, size) -> None:
    logits, targets = logits_and_targets((3, 8, 24))
    targets = ignore_some(targets, **options)
    pool(size)(assert_like_reference, logits, targets, size, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_plain(options, reduction) -> None:
    logits, targets = logits_and_targets((3, 8, 24))
    assert_like_reference(logits, ignore_some(targets, **options), None, reduction=reduction, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_shapes_sharded(pool, shape) -> None:
    pool(2)(assert_like_reference, *logits_and_targets(shape), 2, reduction="none")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_shapes_plain(shape) -> None:
    assert_like_reference(*logits_and_targets(shape), None, reduction="none")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options) -> None:
    logits, targets = logits_and_targets((4, 7), scale=1.0)
    targets = ignore_some(targets, **options)
    assert torch.autograd.gradcheck(
        lambda logits: fabric_tp.cross_entropy(logits, targets, reduction="none", **options), logits.requires_grad_()
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored_like_torch(reduction) -> None:
    logits, targets = logits_and_targets((8, 24))
    assert_like_reference(logits, torch.full_like(targets, -100), None, reduction=reduction)


def test_all_ignored_sharded(pool) -> None:
    logits, targets = logits_and_targets((8, 24))
    pool(2)(assert_like_reference, logits, torch.full_like(targets, -100), 2, reduction="mean")


def test_targets_not_contiguous() -> None:
    logits, targets = logits_and_targets((3, 8, 24))
    expected = fabric_tp.cross_entropy(logits, targets)
    assert_equal(fabric_tp.cross_entropy(logits, targets.t().contiguous().t()), expected)


def stable_for_large_logits(size: int) -> None:
    logits, targets = logits_and_targets((8, 24))
    logits = (logits.sign() * 1e4 + logits).float()
    expected_logits = logits.clone().requires_grad_()
    expected = F.cross_entropy(expected_logits, targets)
    expected.backward()
    local, given = shard(logits, size)
    loss = fabric_tp.cross_entropy(given, targets)
    loss.backward()
    assert expected_logits.grad is not None
    assert local.grad is not None
    assert_equal(loss, expected, 1e-6)
    assert_equal(local.grad, expected_logits.grad.chunk(size, -1)[given.device_mesh.get_local_rank()], 1e-6)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_large_logits(pool, size) -> None:
    pool(size)(stable_for_large_logits, size)


def bf16_as_exact_as_its_rounding(size: int) -> None:
    logits, targets = logits_and_targets((64, 24))
    logits = logits.bfloat16()
    expected_logits = logits.float().requires_grad_()
    expected = F.cross_entropy(expected_logits, targets)
    expected.backward()
    local, given = shard(logits, size)
    loss = fabric_tp.cross_entropy(given, targets)
    loss.backward()
    assert expected_logits.grad is not None
    assert local.grad is not None
    assert_equal(loss, expected, 1e-6)
    mine = expected_logits.grad.chunk(size, -1)[given.device_mesh.get_local_rank()]
    torch.testing.assert_close(local.grad, mine.bfloat16(), rtol=2**-7, atol=1e-8)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_bf16(pool, size) -> None:
    pool(size)(bf16_as_exact_as_its_rounding, size)


class Chunks(OperationMode):
    """Rows of the logits of which the exponentials are taken at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def see(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if operation is torch.ops.aten.exp_.default:
            self.rows.append(len(args[0]))
        return operation(*args, **kwargs)


@pytest.mark.parametrize(
    ("elements", "most", "sizes"),
    [
        (1, 64, 24 * [1]),
        (24, 64, 24 * [1]),
        (100, 64, 6 * [4]),
        (2**22, 64, [24]),
        (1, 5, [5, 5, 5, 5, 4]),
        (100, 5, [5, 5, 5, 5, 4]),
    ],
)
def test_chunks(monkeypatch, elements, most, sizes) -> None:
    """Of 24 rows of 24 logits."""
    monkeypatch.setattr(vocab_parallel, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(vocab_parallel, "CHUNKS", most)
    logits, targets = logits_and_targets((3, 8, 24))
    with Chunks() as chunks:
        assert_like_reference(logits, ignore_some(targets, 3), None, **OPTIONS["all"])
    assert chunks.rows == 2 * sizes  # in the forward and in the backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_of_the_size_of_the_logits_but_their_gradient(monkeypatch, dtype) -> None:
    """Beside the logits: their gradient in their dtype, a few chunks in fp32, and a few numbers for each row."""
    rows, columns, chunk = 256, 512, 1024
    monkeypatch.setattr(vocab_parallel, "CHUNK_ELEMENTS", chunk)
    logits = torch.randn(rows, columns).to(dtype).requires_grad_()
    targets = torch.randint(columns, (rows,))
    with MemoryTracker() as tracker:
        fabric_tp.cross_entropy(logits, targets).backward()
    of_logits = logits.numel() * dtype.itemsize
    assert tracker.memory().peak < 2 * of_logits + 3 * 4 * chunk + 80 * rows < 2.5 * of_logits


def torch_loss_parallel_agrees() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(VOCABULARY, (2, LENGTH), generator=generator) for _ in range(2))
    model = fabric_tp.litgpt()(build("Llama-3-8B"), mesh(1, 2))
    ours = fabric_tp.cross_entropy(model(tokens), targets)
    ours.backward()
    gradients = {name: gather_shards(parameter.grad).clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with loss_parallel():
        theirs = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        theirs.backward()
    assert_equal(theirs.full_tensor(), ours, 1e-6)  # type: ignore[attr-defined]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gather_shards(parameter.grad), gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_torch_loss_parallel(pool) -> None:
    pool(2)(torch_loss_parallel_agrees)


def count(size: int | None, options: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """Collectives of the forward and of the backward."""
    logits, targets = logits_and_targets((3, 8, 24))
    given = shard(logits, size)[1] if size else logits.requires_grad_()
    with Collectives() as forward:
        loss = fabric_tp.cross_entropy(given, targets, **options)
    with Collectives() as backward:
        loss.backward()
    return forward.counts, backward.counts


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_two_collectives_forward_none_backward(pool, options) -> None:
    assert pool(2)(count, 2, options) == ({AR: 2}, {})


def test_no_collectives_of_plain_logits(pool) -> None:
    assert pool(2)(count, None, {}) == ({}, {})


def error_without(dropped: str) -> float:
    """Of the loss, when this one of the reductions returns what it is given."""
    logits, targets = logits_and_targets((3, 8, 24))
    with mock.patch.object(vocab_parallel, dropped, lambda x, group: x) if dropped else mock.MagicMock():
        loss = fabric_tp.cross_entropy(shard(logits, 2)[1], targets)
    return abs(loss.item() - reference(logits, targets).item())


def test_error_is_zero_with_both_reductions(pool) -> None:
    assert pool(2)(error_without, "") < TOLERANCE


@pytest.mark.parametrize("dropped", ["maximum_over_ranks", "sum_over_ranks"])
def test_notices_a_dropped_reduction(pool, dropped) -> None:
    assert pool(2)(error_without, dropped) > 1e-3
