"""Models with fused_loss=True: the same loss, gradients, text and weights, without the logits of all rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import fabric_tp
from fabric_tp.loss import chunks, functional
from fabric_tp.loss.options import LossOptions
from fabric_tp.styles import Colwise, LMHead
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import VOCABULARY, small_config, small_gpt, small_lora, small_transformers
from tests.loss.counting import AG, AR, RS, Collectives, Watch
from tests.loss.models import MODELS, tokens
from tests.parallelize.test_parallelize import train
from tests.parity import PARTITIONED, assert_equal, differences_of


def cases() -> Iterator[Any]:
    """Every size with one model, every kind of LM head with one size."""
    for name, sizes, sequence_parallel in product(MODELS, [(1, 1), (1, 2), (2, 2)], [True, False]):
        main = sizes == (1, 2) and (name == "Llama 3" or (name != "Pythia" and sequence_parallel))
        if not main and (len(name) + sum(sizes) + sequence_parallel) % 2:
            continue  # every other one of them: each model on each mesh, each with sequence parallelism and without
        identity = f"{name}-{sizes}-{'sp' if sequence_parallel else 'no sp'}"
        yield pytest.param(name, sizes, sequence_parallel, id=identity, marks=() if main else pytest.mark.sweep)


@pytest.mark.parametrize(("name", "sizes", "sequence_parallel"), cases())
def test_equals_one_device(pool, name, sizes, sequence_parallel) -> None:
    """Loss, every gradient, norm and weights, with two micro-batches to a step."""
    parallelize_fn = fabric_tp.litgpt(sequence_parallel=sequence_parallel, fused_loss=True)
    assert_equal(pool, MODELS[name], parallelize_fn, sizes, steps=2)


@pytest.mark.swept(lambda p: "compile" in p["options"] or p["options"] == {"activation_checkpointing": "full"})
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
    backend = PARTITIONED if "compile" in options else ""
    assert_equal(pool, MODELS["Llama 3"], fabric_tp.litgpt(fused_loss=True, **options), steps=2, backend=backend)


@pytest.mark.swept(lambda p: p["name"] == "Gemma2")
@pytest.mark.parametrize("name", ["Gemma2", "Llama, tied embeddings"])
def test_transformers(pool, name) -> None:
    assert_equal(pool, partial(small_transformers, name), fabric_tp.auto(fused_loss=True), (1, 2), steps=2)


@pytest.mark.swept(lambda p: p["adapted"] == "every layer")
@pytest.mark.parametrize("adapted", ["every layer", "query and value"])
def test_low_rank_adapters(pool, adapted) -> None:
    """An LM head with an adapter computes its logits; one that is not trained has no gradient."""
    build = partial(small_lora, "Llama-3-8B", adapted)
    assert_equal(pool, build, fabric_tp.litgpt(fused_loss=True), (1, 2), steps=2)


def test_notices_a_dropped_sum_of_the_input_gradient(pool) -> None:
    parallelize_fn = fabric_tp.litgpt(sequence_parallel=False, fused_loss=True)
    worst = differences_of(pool, MODELS["Llama 3"], parallelize_fn, break_model=drop_sum)
    restored = differences_of(pool, MODELS["Llama 3"], parallelize_fn, break_model=restore_sum)
    assert max(worst.values()) > 1e-2
    assert max(restored.values()) < 1e-4


_sum = chunks.reduce


def drop_sum(_: nn.Module) -> None:
    chunks.reduce = lambda x, group: x  # type: ignore[assignment]


def restore_sum(_: nn.Module) -> None:
    chunks.reduce = _sum


@pytest.mark.swept(lambda p: (p["sizes"], p["precision"]) != ((1, 2), "bf16-mixed"))
@pytest.mark.parametrize("precision", [None, "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_fabric(pool, sizes, precision) -> None:
    """Lightning's hooks and conversions of the output."""
    ranks = pool(sizes[0] * sizes[1])
    fused = ranks(train, sizes, True, {"fused_loss": True}, precision)
    assert fused == pytest.approx(ranks(train, sizes, True, {}, precision), rel=3e-2 if precision else 1e-5)


@pytest.mark.sweep
def test_mixed_precision_of_fsdp(pool) -> None:
    options = {"mixed_precision": "bf16-mixed"}
    fused = pool(4)(train, (2, 2), True, {"fused_loss": True, **options})
    assert fused == pytest.approx(pool(4)(train, (2, 2), True, options), rel=1e-2)


ROWS, COLUMNS = 512, 2000


def largest_of_a_step(fused_loss: bool) -> int:
    config = small_config("Llama-3-8B", n_layer=1, padded_vocab_size=2 * COLUMNS, block_size=ROWS)
    model = fabric_tp.litgpt(fused_loss=fused_loss)(small_gpt(config), mesh(1, 2))
    x = torch.randint(VOCABULARY, (1, ROWS))
    options = partial(LossOptions, chunk_size=32)
    with mock.patch.object(functional, "LossOptions", options), Watch() as watch:
        fabric_tp.cross_entropy(model(x), x).backward()
    return watch.largest


def test_no_logits_of_all_rows(pool) -> None:
    """Nothing is larger than this rank's part of the LM head's weight."""
    assert pool(2)(largest_of_a_step, True) == COLUMNS * small_config("Llama-3-8B").n_embd < ROWS * COLUMNS
    assert pool(2)(largest_of_a_step, False) == ROWS * COLUMNS


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


@pytest.mark.parametrize(
    ("sequence_parallel", "loss", "from_forward", "from_backward"),
    [(True, {AG: 2, RS: 1}, {AG: 1}, {RS: 1, AG: 1}), (False, {AG: 1, AR: 1}, {}, {AR: 1})],
    ids=["sp", "no sp"],
)
def test_collectives(pool, sequence_parallel, loss, from_forward, from_backward) -> None:
    """Those of the LM head are part of the loss, with a small all-gather for its chunk; nothing is gathered again."""
    forward, of_loss, backward = pool(2)(count, sequence_parallel, True)
    unfused_forward, _, unfused_backward = pool(2)(count, sequence_parallel, False)
    assert of_loss == loss
    assert forward + Counter(from_forward) == unfused_forward
    assert backward + Counter(from_backward) == unfused_backward


def text(fused_loss: bool, loss_parallel: bool) -> list[int]:
    model = fabric_tp.litgpt(fused_loss=fused_loss, loss_parallel=loss_parallel)(MODELS["Llama 3"](), mesh(1, 2))
    return fabric_tp.generate(model, tokens()[0, :5], 6, temperature=0).tolist()


@pytest.mark.parametrize("loss_parallel", [True, False])
def test_generate(pool, loss_parallel) -> None:
    assert pool(2)(text, True, loss_parallel) == pool(2)(text, False, loss_parallel)


@pytest.mark.parametrize(
    ("module", "layout"), [(nn.Embedding(8, 4), "replicate"), (nn.Linear(4, 8), None)], ids=["not linear", "no layout"]
)
def test_lm_head_must_be_linear_and_take_its_input_as_it_comes(module, layout) -> None:
    with pytest.raises(ValueError, match=f"{type(module).__name__} with input_layout={layout!r}"):
        LMHead(fused_loss=True, input_layout=layout).validate(module)


def test_only_the_lm_head_differs() -> None:
    with torch.device("meta"):
        model = MODELS["Llama 3"]()
    plans = [fabric_tp.litgpt(fused_loss=on).plan(model, tensor_parallel_size=2) for on in (True, False)]
    assert {name for name in plans[0] if repr(plans[0][name]) != repr(plans[1][name])} == {"lm_head"}
    assert isinstance(plans[0]["lm_head"], Colwise)
