"""cross_entropy equals torch's in value and gradient, of sharded and of plain logits."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel

import fabric_tp
from fabric_tp import _torch
from fabric_tp.shards import gather_shards
from fabric_tp.testing.ranks import mesh
from tests.models import LENGTH, VOCABULARY, build

TOLERANCE = 1e-10
"""Of fp64."""

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "ignore_index": {"ignore_index": 3},
    "label_smoothing": {"label_smoothing": 0.1},
    "only_smoothing": {"label_smoothing": 1.0},
    "z_loss": {"z_loss": 0.01},
    "all": {"ignore_index": 3, "label_smoothing": 0.2, "z_loss": 0.01},
}
REDUCTIONS = ["mean", "sum", "none"]
SHAPES = [(8, 24), (3, 8, 24), (2, 3, 4, 24)]


def example(shape: tuple[int, ...], scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits in fp64, and targets of which some are -100 and some 3."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    targets.view(-1)[::4] = 3
    return logits, targets


def ignore_some(targets: Tensor, ignore_index: int = -100, **_: Any) -> Tensor:
    targets = targets.clone()
    targets.view(-1)[1::3] = ignore_index
    return targets


def reference(
    logits: Tensor, targets: Tensor, *, reduction: str = "mean", z_loss: float = 0.0, **options: Any
) -> Tensor:
    """torch's cross-entropy, plus ``z_loss`` times the squared log of the softmax denominator."""
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction, **options)
    loss = loss.view(targets.shape) if reduction == "none" else loss
    if not z_loss:
        return loss
    counts = targets != options.get("ignore_index", -100)
    extra = z_loss * logits.exp().sum(-1).log().square() * counts
    return loss + {"none": extra, "sum": extra.sum(), "mean": extra.sum() / counts.sum()}[reduction]


def tensor_parallel(size: int) -> DeviceMesh:
    return mesh(1, size)["tensor_parallel"]


def shard(logits: Tensor, size: int) -> tuple[Tensor, DTensor]:
    """This rank's columns, a leaf, and the DTensor of them."""
    axis = tensor_parallel(size)
    local = logits.detach().chunk(size, -1)[axis.get_local_rank()].clone().requires_grad_()
    return local, DTensor.from_local(local, axis, [Shard(logits.dim() - 1)], run_check=False)


def assert_equal(value: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


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


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sharded(pool, options, reduction, size) -> None:
    logits, targets = example((3, 8, 24))
    targets = ignore_some(targets, **options)
    pool(size)(assert_like_reference, logits, targets, size, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_plain(options, reduction) -> None:
    logits, targets = example((3, 8, 24))
    assert_like_reference(logits, ignore_some(targets, **options), None, reduction=reduction, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_shapes_sharded(pool, shape) -> None:
    pool(2)(assert_like_reference, *example(shape), 2, reduction="none")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_shapes_plain(shape) -> None:
    assert_like_reference(*example(shape), None, reduction="none")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options) -> None:
    logits, targets = example((4, 7), scale=1.0)
    targets = ignore_some(targets, **options)
    assert torch.autograd.gradcheck(
        lambda logits: fabric_tp.cross_entropy(logits, targets, reduction="none", **options), logits.requires_grad_()
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored_like_torch(reduction) -> None:
    logits, targets = example((8, 24))
    assert_like_reference(logits, torch.full_like(targets, -100), None, reduction=reduction)


def test_all_ignored_sharded(pool) -> None:
    logits, targets = example((8, 24))
    pool(2)(assert_like_reference, logits, torch.full_like(targets, -100), 2, reduction="mean")


def test_targets_not_contiguous() -> None:
    logits, targets = example((3, 8, 24))
    expected = fabric_tp.cross_entropy(logits, targets)
    assert_equal(fabric_tp.cross_entropy(logits, targets.t().contiguous().t()), expected)


def stable_for_large_logits(size: int) -> None:
    logits, targets = example((8, 24))
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
    logits, targets = example((64, 24))
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


@pytest.mark.parametrize("elements", [1, 24, 100])
def test_chunks(monkeypatch, elements) -> None:
    monkeypatch.setattr(fabric_tp.loss, "CHUNK_ELEMENTS", elements)
    logits, targets = example((3, 8, 24))
    assert_like_reference(logits, ignore_some(targets, 3), None, **OPTIONS["all"])


@pytest.mark.parametrize("wrong", [-1, 24, -101])
def test_target_out_of_range(wrong) -> None:
    logits, targets = example((8, 24))
    targets[5] = wrong
    with pytest.raises(ValueError, match=rf"\[0, 24\) or be ignore_index=-100, but 1 are not, {wrong} for one"):
        fabric_tp.cross_entropy(logits, targets)


def rejects_padding_of_the_last_rank(size: int) -> None:
    logits, targets = example((8, 24))
    targets[5] = 24
    with pytest.raises(ValueError, match="24 for one"):
        fabric_tp.cross_entropy(shard(logits, size)[1], targets)


def test_target_out_of_range_sharded(pool) -> None:
    pool(2)(rejects_padding_of_the_last_rank, 2)


@pytest.mark.parametrize("shape", [(3, 7), (8, 3), (24,), (3, 8, 24)], ids=str)
def test_wrong_shapes(shape) -> None:
    logits, _ = example((3, 8, 24))
    with pytest.raises(ValueError, match=r"\(3, 8, 24\).*" + str(shape).replace("(", r"\(").replace(")", r"\)")):
        fabric_tp.cross_entropy(logits, torch.zeros(shape, dtype=torch.int64))


def test_wrong_reduction() -> None:
    with pytest.raises(ValueError, match="'average' is not known; it must be 'mean', 'sum' or 'none'"):
        fabric_tp.cross_entropy(*example((8, 24)), reduction="average")  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", [-0.1, 1.1])
def test_wrong_label_smoothing(smoothing) -> None:
    with pytest.raises(ValueError, match=str(smoothing)):
        fabric_tp.cross_entropy(*example((8, 24)), label_smoothing=smoothing)


def rejects_other_placements() -> None:
    logits, targets = example((3, 8, 24))
    for placement in (Shard(1), Replicate()):
        given = DTensor.from_local(logits, tensor_parallel(2), [placement], run_check=False)
        with pytest.raises(ValueError, match=r"Shard\(2\)"):
            fabric_tp.cross_entropy(given, targets.new_zeros(given.shape[:-1]))
    with pytest.raises(ValueError, match=r"one-dimensional"):
        fabric_tp.cross_entropy(
            DTensor.from_local(logits, mesh(1, 2), [Replicate(), Shard(2)], run_check=False), targets
        )


def test_wrongly_sharded(pool) -> None:
    pool(2)(rejects_other_placements)


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


def count_collectives(size: int | None, options: dict[str, Any]) -> tuple[int, int]:
    """In the forward and in the backward."""
    logits, targets = example((3, 8, 24))
    given = shard(logits, size)[1] if size else logits.requires_grad_()
    with CommDebugMode() as forward:
        loss = fabric_tp.cross_entropy(given, targets, **options)
    with CommDebugMode() as backward:
        loss.backward()
    return forward.get_total_counts(), backward.get_total_counts()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_two_collectives_forward_none_backward(pool, options) -> None:
    assert pool(2)(count_collectives, 2, options) == (2, 0)


def test_no_collectives_of_plain_logits(pool) -> None:
    assert pool(2)(count_collectives, None, {}) == (0, 0)


def error_without_all_reduce(dropped: str | None) -> float:
    """Of the loss, when this one of the reductions returns its input."""
    logits, targets = example((3, 8, 24))
    all_reduce = _torch.all_reduce

    def lossy(x: Tensor, group_name: str, op: str = "sum") -> Tensor:
        return x if op == dropped else all_reduce(x, group_name, op)

    with mock.patch.object(_torch, "all_reduce", lossy):
        loss = fabric_tp.cross_entropy(shard(logits, 2)[1], targets)
    return abs(loss.item() - reference(logits, targets).item())


def test_error_is_zero_with_both_reductions(pool) -> None:
    assert pool(2)(error_without_all_reduce, None) < TOLERANCE


@pytest.mark.parametrize("dropped", ["max", "sum"])
def test_notices_a_dropped_reduction(pool, dropped) -> None:
    assert pool(2)(error_without_all_reduce, dropped) > 1e-3
