"""fused_loss=True: the same model, loss and gradients, and no logits unless somebody looks at them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fabric_tp
from fabric_tp.loss import linear as linear_loss
from fabric_tp.loss.deferred import DeferredLogits
from fabric_tp.shards import gather_shards
from fabric_tp.styles import Colwise, LMHead
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import LENGTH, VOCABULARY, small_config, small_gpt, small_lora, small_transformers
from tests.loss.test_linear import Watch
from tests.parallelize.test_parallelize import train
from tests.parity import assert_equal, differences_of

SIZES = [(1, 1), (1, 2), (2, 2)]


def tied_gpt(name: str) -> nn.Module:
    model: Any = small_gpt(small_config(name))
    model.transformer.wte.weight = model.lm_head.weight
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama 3": partial(small_gpt, small_config("Llama-3-8B")),
    "Llama 3, tied": partial(tied_gpt, "Llama-3-8B"),
    "Gemma 2, softcapping": partial(small_gpt, small_config("Gemma-2-2b")),
    "Phi 2, bias": partial(small_gpt, small_config("phi-2")),
    "Pythia": partial(small_gpt, small_config("pythia-14m")),
}


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no sp"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_device(pool, name, sizes, sequence_parallel) -> None:
    """Loss, every gradient, norm and weights, with two micro-batches to a step."""
    parallelize_fn = fabric_tp.litgpt(sequence_parallel=sequence_parallel, fused_loss=True)
    assert_equal(pool, MODELS[name], parallelize_fn, sizes, steps=2)


@pytest.mark.parametrize(
    "options",
    [
        {"compile": True},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"loss_parallel": False},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_with_other_options(pool, options) -> None:
    assert_equal(pool, MODELS["Llama 3"], fabric_tp.litgpt(fused_loss=True, **options), (2, 2), steps=2)


@pytest.mark.parametrize("name", ["Gemma2", "Llama, tied embeddings"])
def test_transformers(pool, name) -> None:
    assert_equal(pool, partial(small_transformers, name), fabric_tp.auto(fused_loss=True), (2, 2), steps=2)


@pytest.mark.parametrize("adapted", ["every layer", "query and value"])
def test_low_rank_adapters(pool, adapted) -> None:
    """A head with an adapter computes its logits; one that is not trained has no gradient."""
    build = partial(small_lora, "Llama-3-8B", adapted)
    assert_equal(pool, build, fabric_tp.litgpt(fused_loss=True), (2, 2), steps=2)


def test_notices_a_dropped_sum_of_the_input_gradient(pool) -> None:
    parallelize_fn = fabric_tp.litgpt(sequence_parallel=False, fused_loss=True)
    worst = differences_of(pool, MODELS["Llama 3"], parallelize_fn, break_model=drop_sum)
    restored = differences_of(pool, MODELS["Llama 3"], parallelize_fn, break_model=restore_sum)
    assert max(worst.values()) > 1e-2
    assert max(restored.values()) < 1e-4


_sum = linear_loss.reduce


def drop_sum(_: nn.Module) -> None:
    linear_loss.reduce = lambda x, group: x  # type: ignore[assignment]


def restore_sum(_: nn.Module) -> None:
    linear_loss.reduce = _sum


@pytest.mark.parametrize("precision", [None, "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_fabric(pool, sizes, precision) -> None:
    """Lightning's hooks and conversions of the output."""
    ranks = pool(sizes[0] * sizes[1])
    fused = ranks(train, sizes, True, {"fused_loss": True}, precision)
    assert fused == pytest.approx(ranks(train, sizes, True, {}, precision), rel=3e-2 if precision else 1e-5)


def test_mixed_precision_of_fsdp(pool) -> None:
    options = {"mixed_precision": "bf16-mixed"}
    fused = pool(4)(train, (2, 2), True, {"fused_loss": True, **options})
    assert fused == pytest.approx(pool(4)(train, (2, 2), True, options), rel=1e-2)


def model_of(name: str = "Llama 3", **options: Any) -> nn.Module:
    return fabric_tp.auto(fused_loss=True, **options)(MODELS[name](), mesh(1, 2))


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def logits_of_one_device(name: str) -> Tensor:
    return MODELS[name]()(tokens())


def looks_like_logits() -> None:
    with mock.patch.object(DeferredLogits, "compute", side_effect=AssertionError):
        logits = model_of()(tokens())
        assert isinstance(logits, DeferredLogits)
        assert logits.shape == (2, LENGTH, VOCABULARY)
        assert (logits.dim(), logits.size(-1), len(logits)) == (3, VOCABULARY, 2)
        assert logits.numel() == 2 * LENGTH * VOCABULARY
        assert logits.dtype == torch.float32
        assert logits.device == torch.device("cpu")
        assert logits.is_floating_point()
        assert logits.requires_grad
        assert repr(logits) == f"DeferredLogits(shape=(2, {LENGTH}, {VOCABULARY}), dtype=torch.float32)"
        with torch.no_grad():
            assert not model_of()(tokens()).requires_grad


def test_looks_like_logits_without_being_computed(pool) -> None:
    pool(2)(looks_like_logits)


LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": lambda logits: logits[..., :-1, :],
    "one position": lambda logits: logits[:, -1],
    "one sequence": lambda logits: logits[1],
    "view": lambda logits: logits.view(-1, VOCABULARY),
    "reshape": lambda logits: logits.reshape(-1, logits.size(-1)),
    "flatten": lambda logits: logits.flatten(0, 1),
    "shifted, contiguous, view": lambda logits: logits[:, :-1].contiguous().view(-1, VOCABULARY),
    "float": lambda logits: logits.float(),
    "double": lambda logits: logits.to(torch.float64),
}

COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "some columns": lambda logits: logits[..., :5],
    "chosen rows": lambda logits: logits[:, torch.tensor([3, 1, 1])],
    "all in one": lambda logits: logits.flatten(),
    "sum": lambda logits: logits.sum(),
    "method": lambda logits: logits.argmax(-1),
    "function": lambda logits: torch.softmax(logits, -1),
    "second argument": lambda logits: torch.ones(VOCABULARY) + logits,
    "transpose": lambda logits: logits.mT,
    "functional": lambda logits: F.log_softmax(logits, dim=-1),
}


def stays_deferred(name: str) -> None:
    logits = LAZY[name](model_of(loss_parallel=False)(tokens()))
    assert isinstance(logits, DeferredLogits)
    expected = LAZY[name](logits_of_one_device("Llama 3"))
    assert (logits.shape, logits.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(logits.compute(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAZY)
def test_stays_deferred(pool, name) -> None:
    pool(2)(stays_deferred, name)


def gets_computed(name: str) -> None:
    result = COMPUTED[name](model_of(loss_parallel=False)(tokens()))
    assert type(result) is Tensor
    torch.testing.assert_close(result, COMPUTED[name](logits_of_one_device("Llama 3")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", COMPUTED)
def test_anything_else_gets_real_logits(pool, name) -> None:
    pool(2)(gets_computed, name)


def computed_is_sharded() -> None:
    logits = model_of()(tokens()) + 0
    assert isinstance(logits, DTensor)
    torch.testing.assert_close(logits.full_tensor(), logits_of_one_device("Llama 3"), rtol=1e-4, atol=1e-4)


def test_real_logits_are_sharded_under_loss_parallel(pool) -> None:
    pool(2)(computed_is_sharded)


def loss_and_gradient(model: nn.Module, change: Callable[[Tensor], Tensor], reduction: str) -> list[Tensor]:
    model.zero_grad()
    logits = change(model(tokens()))
    targets = torch.randint(VOCABULARY, logits.shape[:-1], generator=torch.Generator().manual_seed(1))
    targets.flatten()[::3] = -100
    loss = fabric_tp.cross_entropy(logits, targets, reduction=reduction, label_smoothing=0.1)  # type: ignore[arg-type]
    loss.sum().backward()
    gradients = [gather_shards(p.grad) for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients]


def loss_of_changed(name: str, change: str, reduction: str, computed: int) -> None:
    """The loss of logits after a change, computed so many times."""
    changes = {**LAZY, "softcapped": lambda x: torch.tanh(x / 3) * 3, "doubled": lambda x: x * 2, "": lambda x: x}
    unfused = fabric_tp.auto()(MODELS[name](), mesh(1, 2))
    model = model_of(name)
    with mock.patch.object(DeferredLogits, "compute", autospec=True, side_effect=DeferredLogits.compute) as compute:
        fused = loss_and_gradient(model, changes[change], reduction)
    assert compute.call_count == computed
    for value, expected in zip(fused, loss_and_gradient(unfused, changes[change], reduction), strict=True):
        torch.testing.assert_close(value.to(expected.dtype), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("change", ["", "shifted", "one position", "view", "softcapped", "float"])
def test_loss_of_deferred(pool, change, reduction) -> None:
    pool(2)(loss_of_changed, "Llama 3", change, reduction, 0)


def test_softcapping_of_the_model_is_part_of_the_loss(pool) -> None:
    pool(2)(loss_of_changed, "Gemma 2, softcapping", "", "mean", 0)


def test_loss_of_logits_changed_otherwise_is_that_of_real_ones(pool) -> None:
    pool(2)(loss_of_changed, "Llama 3", "doubled", "mean", 1)


ROWS, COLUMNS = 512, 2000


def largest_of_a_step(fused_loss: bool) -> int:
    config = small_config("Llama-3-8B", n_layer=1, padded_vocab_size=2 * COLUMNS, block_size=ROWS)
    model = fabric_tp.litgpt(fused_loss=fused_loss)(small_gpt(config), mesh(1, 2))
    x = torch.randint(VOCABULARY, (1, ROWS))
    with mock.patch.object(fabric_tp.loss, "CHUNK_SIZE", 32), Watch() as watch:
        fabric_tp.cross_entropy(model(x), x).backward()
    return watch.largest


def test_no_logits_of_all_rows(pool) -> None:
    """Nothing is larger than this rank's part of the head."""
    assert pool(2)(largest_of_a_step, True) == COLUMNS * small_config("Llama-3-8B").n_embd < ROWS * COLUMNS
    assert pool(2)(largest_of_a_step, False) == ROWS * COLUMNS


class Collectives(TorchDispatchMode):
    """Their number by name. CommDebugMode would set a full backward hook on the model, and so get real logits."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if operation.namespace == "c10d":
            raise AssertionError(f"{name} is not counted")
        if operation.namespace == "_c10d_functional" and name != "wait_tensor":
            self.counts[name] += 1
        return operation(*args, **(kwargs or {}))


def count(sequence_parallel: bool, fused_loss: bool) -> list[Counter[str]]:
    """Collectives of forward, of the loss, and of the backward without the bucket of partial gradients at its end."""
    options = {"sequence_parallel": sequence_parallel, "fused_loss": fused_loss}
    model, x = fabric_tp.litgpt(**options)(MODELS["Llama 3"](), mesh(1, 2)), tokens()
    parameters = [p for p in model.parameters() if p.requires_grad]
    modes = [Collectives() for _ in range(3)]
    with modes[0]:
        logits = model(x)
    with modes[1]:
        loss = fabric_tp.cross_entropy(logits, x)
    with modes[2]:
        torch.autograd.grad(loss, parameters)
    return [mode.counts for mode in modes]


AG, RS, AR = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"


@pytest.mark.parametrize(
    ("sequence_parallel", "loss", "from_forward", "from_backward"),
    [(True, {AG: 2, RS: 1}, {AG: 1}, {RS: 1, AG: 1}), (False, {AG: 1, AR: 1}, {}, {AR: 1})],
    ids=["sp", "no sp"],
)
def test_collectives(pool, sequence_parallel, loss, from_forward, from_backward) -> None:
    """Those of the head are part of the loss, with a small all-gather for its chunk; nothing is gathered again."""
    forward, of_loss, backward = pool(2)(count, sequence_parallel, True)
    unfused_forward, _, unfused_backward = pool(2)(count, sequence_parallel, False)
    assert of_loss == loss
    assert forward + Counter(from_forward) == unfused_forward
    assert backward + Counter(from_backward) == unfused_backward


def hooks_are_called() -> None:
    model, seen = model_of(), []
    logits = model(tokens())
    logits.register_hook(seen.append)
    fabric_tp.cross_entropy(logits[:, :-1], tokens()[:, 1:]).backward()
    assert seen == [None]


def test_hooks_on_deferred_logits_are_called(pool) -> None:
    """As FSDP2 and Fabric need it, whatever view of them the loss was of."""
    pool(2)(hooks_are_called)


def full_backward_hook_sees_gradients() -> None:
    model, seen = model_of(loss_parallel=False), []
    model.register_full_backward_hook(lambda module, grad_input, grad_output: seen.extend(grad_output))  # type: ignore[arg-type]
    logits = model(tokens())
    assert type(logits) is Tensor
    fabric_tp.cross_entropy(logits, tokens()).backward()
    assert seen[0].shape == logits.shape
    assert seen[0].abs().sum() > 0


def test_full_backward_hooks_get_the_gradient_of_real_logits(pool) -> None:
    pool(2)(full_backward_hook_sees_gradients)


def text(fused_loss: bool, loss_parallel: bool) -> list[int]:
    model = fabric_tp.litgpt(fused_loss=fused_loss, loss_parallel=loss_parallel)(MODELS["Llama 3"](), mesh(1, 2))
    return fabric_tp.generate(model, tokens()[0, :5], 6, temperature=0).tolist()


@pytest.mark.parametrize("loss_parallel", [True, False])
def test_generate(pool, loss_parallel) -> None:
    assert pool(2)(text, True, loss_parallel) == pool(2)(text, False, loss_parallel)


@pytest.mark.parametrize(
    ("module", "layout"), [(nn.Embedding(8, 4), "replicate"), (nn.Linear(4, 8), None)], ids=["not linear", "no layout"]
)
def test_head_must_be_linear_and_take_its_input_as_it_comes(module, layout) -> None:
    with pytest.raises(ValueError, match=f"{type(module).__name__} with input_layout={layout!r}"):
        LMHead(fused_loss=True, input_layout=layout).validate(module)


def test_only_the_head_differs() -> None:
    with torch.device("meta"):
        model = MODELS["Llama 3"]()
    plans = [fabric_tp.litgpt(fused_loss=on).plan(model, tensor_parallel_size=2) for on in (True, False)]
    assert {name for name in plans[0] if repr(plans[0][name]) != repr(plans[1][name])} == {"lm_head"}
    assert isinstance(plans[0]["lm_head"], Colwise)
