"""linear_cross_entropy equals the loss of whole logits in value and every gradient, and never has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fabric_tp
from fabric_tp.loss import linear as linear_loss
from fabric_tp.testing.ranks import mesh
from tests.loss.test_vocab_parallel import (
    OPTIONS,
    REDUCTIONS,
    TOLERANCE,
    assert_equal,
    ignore_some,
    reference,
    tensor_parallel,
)

WIDTH, VOCABULARY, SHAPE, CHUNK = 6, 24, (3, 8), 5
LAYOUTS = ["replicate", "sequence"]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"with_bias": True},
    "softcap": {"softcap": 2.0},
    "bias and softcap": {"with_bias": True, "softcap": 2.0},
}

Inputs = tuple[Tensor, Tensor, Tensor | None]


def example(with_bias: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Inputs, Tensor]:
    """Hidden rows, weight and bias, and targets of which some are 3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*SHAPE, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64) if with_bias else None
    targets = torch.randint(VOCABULARY, SHAPE, generator=generator)
    targets.view(-1)[::4] = 3
    return (hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)), targets


def leaves(inputs: Inputs) -> Inputs:
    hidden, weight, bias = (None if x is None else x.detach().clone().requires_grad_() for x in inputs)
    assert hidden is not None
    assert weight is not None
    return hidden, weight, bias


def mine(inputs: Inputs, layout: str, size: int) -> Inputs:
    """This rank's part, leaves."""
    rank = tensor_parallel(size).get_local_rank()
    hidden, weight, bias = inputs
    hidden = hidden.chunk(size, 1)[rank] if layout == "sequence" else hidden
    return leaves((hidden, weight.chunk(size)[rank], None if bias is None else bias.chunk(size)[rank]))


def distributed(x: Tensor | None, size: int) -> Any:
    return None if x is None else DTensor.from_local(x, tensor_parallel(size), [Shard(0)], run_check=False)


def whole(inputs: Inputs, targets: Tensor, softcap: float | None = None, **options: Any) -> Tensor:
    logits = F.linear(*inputs)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    return reference(logits, targets, **options)


def fused(inputs: Inputs, targets: Tensor, layout: str, size: int, **options: Any) -> Tensor:
    hidden, weight, bias = inputs
    return fabric_tp.linear_cross_entropy(
        hidden,
        distributed(weight, size),
        targets,
        bias=distributed(bias, size),
        input_layout=layout,  # type: ignore[arg-type]
        **{"chunk_size": CHUNK, **options},
    )


def gradients(loss: Tensor, inputs: Inputs) -> list[Tensor]:
    """For a random gradient of the loss."""
    grad = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad(loss, [x for x in inputs if x is not None], grad.to(loss.dtype)))


def expected_gradients(inputs: Inputs, targets: Tensor, layout: str, size: int, **options: Any) -> list[Tensor]:
    every = leaves(inputs)
    of_hidden, *others = gradients(whole(every, targets, **options), every)
    rank = tensor_parallel(size).get_local_rank()
    if layout == "sequence":
        of_hidden = of_hidden.chunk(size, 1)[rank]
    return [of_hidden, *(grad.chunk(size)[rank] for grad in others)]


def assert_like_whole_logits(
    targets: Tensor, layout: str, size: int, with_bias: bool = False, chunk_size: int = CHUNK, **options: Any
) -> None:
    inputs, _ = example(with_bias)
    parts = mine(inputs, layout, size)
    loss = fused(parts, targets, layout, size, chunk_size=chunk_size, **options)
    assert type(loss) is Tensor
    assert_equal(loss, whole(inputs, targets, **options))
    for grad, expected in zip(
        gradients(loss, parts), expected_gradients(inputs, targets, layout, size, **options), strict=True
    ):
        assert_equal(grad, expected)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_loss_of_whole_logits(pool, options, reduction, layout, size) -> None:
    targets = ignore_some(example()[1], **options)
    every = {**HEADS["bias and softcap"], **options}
    pool(size)(assert_like_whole_logits, targets, layout, size, reduction=reduction, **every)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_heads(pool, head, layout, reduction) -> None:
    pool(2)(assert_like_whole_logits, ignore_some(example()[1]), layout, 2, reduction=reduction, **head)


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


def all_targets_on_one_rank(layout: str) -> None:
    assert_like_whole_logits(torch.full(SHAPE, VOCABULARY - 1), layout, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_targets_on_one_rank(pool, layout) -> None:
    pool(2)(all_targets_on_one_rank, layout)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options) -> None:
    inputs, targets = example(True)
    targets = ignore_some(targets, **options)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fabric_tp.linear_cross_entropy(
            hidden, weight, targets, bias=bias, softcap=2.0, reduction="none", chunk_size=CHUNK, **options
        )

    assert torch.autograd.gradcheck(loss, leaves(inputs), fast_mode=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradient_of_the_sum_is_the_derivative(options) -> None:
    """In a random direction; gradcheck would go backward more than once."""
    inputs, targets = example(True)
    targets = ignore_some(targets, **options)
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs if x is not None]

    def loss(step: float) -> tuple[Tensor, Inputs]:
        moved = [x + step * d for x, d in zip(inputs, direction, strict=True) if x is not None]
        hidden, weight, bias = every = leaves((moved[0], moved[1], moved[2]))
        value = fabric_tp.linear_cross_entropy(
            hidden, weight, targets, bias=bias, softcap=2.0, reduction="sum", chunk_size=CHUNK, **options
        )
        return value, every

    step = 1e-5
    difference = (loss(step)[0] - loss(-step)[0]) / (2 * step)
    slope = sum((g * d).sum() for g, d in zip(_grads(*loss(0.0)), direction, strict=True))
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
    for grad, expected in zip(
        gradients(loss, parts), expected_gradients(inputs, targets, "replicate", size), strict=True
    ):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_large_logits(pool, size) -> None:
    pool(size)(large_logits, size)


def columns_of_minus_infinity() -> None:
    inputs, targets = example(True)
    assert inputs[2] is not None
    inputs[2][VOCABULARY // 2 :] = -torch.inf
    targets %= VOCABULARY // 2
    parts = mine(inputs, "replicate", 2)
    loss = fused(parts, targets, "replicate", 2)
    assert_equal(loss, whole(inputs, targets))
    for grad, expected in zip(gradients(loss, parts), expected_gradients(inputs, targets, "replicate", 2), strict=True):
        assert_equal(grad, expected)


def test_a_rank_with_nothing_but_padding(pool) -> None:
    pool(2)(columns_of_minus_infinity)


def error_of_gradients(values: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(values, exact, strict=True)
    return [float((value.double() - right).norm() / right.norm()) for value, right in pairs]


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

    def errors(loss_of: Callable[[Inputs], Tensor], given: Inputs) -> list[float]:
        given = leaves(given)
        loss = loss_of(given) * 1024
        return error_of_gradients([g / 1024 for g in _grads(loss, given)], exact)

    double = leaves((inputs[0].double(), inputs[1].double(), None))
    exact = _grads(F.cross_entropy(F.linear(*double), targets), double)
    unfused = errors(lambda given: fabric_tp.cross_entropy(F.linear(*given), targets), inputs)
    chunked = errors(lambda given: fabric_tp.linear_cross_entropy(given[0], given[1], targets, chunk_size=64), inputs)
    assert all(mine < 2 * theirs for mine, theirs in zip(chunked, unfused, strict=True)), (chunked, unfused)


def _grads(loss: Tensor, inputs: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x for x in inputs if x is not None]))


def test_autocast_like_a_linear_layer() -> None:
    inputs, targets = example(True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = fabric_tp.cross_entropy(F.linear(*inputs), targets)
        loss = fabric_tp.linear_cross_entropy(inputs[0], inputs[1], targets, bias=inputs[2])
    assert_equal(loss, expected, 1e-5)
    assert abs(float(loss - whole(inputs, targets))) > 1e-4


class Watch(TorchDispatchMode):
    """The largest result of any operation, and multiplications in matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.multiplications = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if type(leaf) is Tensor]
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tensors]
        self.largest = max(self.largest, *sizes, 0, 0)
        if operation.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
            left = [x for x in args if isinstance(x, Tensor) and x.dim() > 1][-2]
            self.multiplications += result.numel() * left.shape[-1]
        return result


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


def count_collectives(layout: str, reduction: str, grad: bool, ignored: int) -> tuple[dict[str, int], dict[str, int]]:
    """In the forward and in the backward."""
    inputs, targets = example()
    targets.view(-1)[:ignored] = -100
    parts = mine(inputs, layout, 2)
    with CommDebugMode() as forward, torch.set_grad_enabled(grad):
        loss = fused(parts, targets, layout, 2, reduction=reduction)
    with CommDebugMode() as backward:
        if grad:
            loss.sum().backward()
    return _named(forward), _named(backward)


def _named(mode: CommDebugMode) -> dict[str, int]:
    return {str(operation).split(".")[-1]: number for operation, number in mode.get_comm_counts().items()}


AG, RS, AR = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"


@pytest.mark.parametrize(("ignored", "chunks"), [(0, 5), (3, 5), (9, 3), (24, 0)])
def test_collectives_sequence(pool, ignored, chunks) -> None:
    forward, backward = pool(2)(count_collectives, "sequence", "mean", True, ignored)
    assert forward == {AG: 1 + chunks, RS: 1}
    assert backward == {}


@pytest.mark.parametrize(("ignored", "chunks"), [(0, 5), (3, 5), (9, 3)])
def test_collectives_replicate(pool, ignored, chunks) -> None:
    forward, backward = pool(2)(count_collectives, "replicate", "mean", True, ignored)
    assert forward == {AG: chunks, AR: 1}
    assert backward == {}


def test_collectives_of_each_loss(pool) -> None:
    """One for all chunks; hidden rows are gathered again rather than kept."""
    forward, backward = pool(2)(count_collectives, "sequence", "none", True, 0)
    assert forward == {AG: 2}
    assert backward == {AG: 1, RS: 1}


def test_collectives_without_gradients(pool) -> None:
    forward, _ = pool(2)(count_collectives, "replicate", "mean", False, 0)
    assert forward == {AG: 1}


def error_without(dropped: str, layout: str, reduction: str) -> float:
    """Of the gradient of hidden, when this sum returns one rank's part."""
    inputs, targets = example()
    parts = mine(inputs, layout, 2)
    rank = tensor_parallel(2).get_local_rank()

    def lossy(x: Tensor, group: Any, dim: int = 0) -> Tensor:
        return x.chunk(2, dim)[rank].clone() if dropped == "reduce_scatter" else x

    with mock.patch.object(linear_loss, dropped, lossy) if dropped else mock.MagicMock():
        (grad,) = torch.autograd.grad(fused(parts, targets, layout, 2, reduction=reduction).sum(), parts[0])
    every = leaves(inputs)
    (expected,) = torch.autograd.grad(whole(every, targets, reduction=reduction).sum(), every[0])
    return float((grad - (expected.chunk(2, 1)[rank] if layout == "sequence" else expected)).abs().max())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("dropped", "layout"), [("reduce", "replicate"), ("reduce_scatter", "sequence")])
def test_notices_a_dropped_sum_of_the_input_gradient(pool, dropped, layout, reduction) -> None:
    assert pool(2)(error_without, "", layout, reduction) < TOLERANCE
    assert pool(2)(error_without, dropped, layout, reduction) > 1e-3


def test_second_backward_is_refused() -> None:
    """Gradients are handed out and not kept."""
    inputs, targets = example()
    hidden, weight, _ = leaves(inputs)
    loss = fabric_tp.linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_target_out_of_range(wrong) -> None:
    (hidden, weight, _), targets = example()
    targets[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"\[0, 24\) or be ignore_index=-100, but 1 are not, {wrong} for one"):
        fabric_tp.linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "average"}, "'average' is not known"),
        ({"label_smoothing": 1.1}, r"label_smoothing=1.1 must lie in \[0, 1\]"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"input_layout": "rows"}, "input_layout='rows' is not known"),
        ({"bias": torch.zeros(5)}, r"\(24, 6\) and its bias \(5,\) do not make a linear layer"),
        ({"targets": torch.zeros(3, 7, dtype=torch.int64)}, r"Targets of the shape \(3, 8\).*theirs is \(3, 7\)"),
        ({"weight": torch.zeros(24, 7)}, "do not make a linear layer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(options, message) -> None:
    (hidden, weight, _), targets = example()
    with pytest.raises(ValueError, match=message):
        fabric_tp.linear_cross_entropy(**{"hidden": hidden, "weight": weight, "targets": targets, **options})


def rejects_other_placements() -> None:
    (hidden, weight, _), targets = example()
    for on, placements in ((tensor_parallel(2), [Shard(1)]), (mesh(1, 2), [Replicate(), Shard(0)])):
        given = DTensor.from_local(weight, on, placements, run_check=False)
        with pytest.raises(ValueError, match=r"split by rows, Shard\(0\).*fused_loss=True"):
            fabric_tp.linear_cross_entropy(hidden, given, targets)


def test_wrongly_sharded(pool) -> None:
    pool(2)(rejects_other_placements)


def test_fake_tensors_have_no_values_to_look_at() -> None:
    """As where a step's memory is only counted; all rows count then."""
    with FakeTensorMode():
        hidden = torch.empty(*SHAPE, WIDTH, requires_grad=True)
        weight = torch.empty(VOCABULARY, WIDTH, requires_grad=True)
        with Watch() as watch:
            fabric_tp.linear_cross_entropy(hidden, weight, torch.empty(SHAPE, dtype=torch.int64)).backward()
    assert watch.multiplications == 3 * hidden.shape[:-1].numel() * weight.numel()
