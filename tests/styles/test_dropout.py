"""Dropout with one seed: a run on any mesh is that of one device."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fabric_tp
from fabric_tp.autograd.run_position import RunPosition
from fabric_tp.styles import Dropout
from fabric_tp.testing import next_token_loss
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.ranks import mesh
from tests.models import LENGTH
from tests.parity import PARTITIONED, compiled_by
from tests.styles.dropout_models import (
    MODELS,
    RATE,
    DropoutFeedForward,
    ExplicitDropout,
    adapters,
    everywhere,
    residual,
)
from tests.styles.dropout_runs import MESHES, follow, samples, train, worst
from tests.styles.table import SIZES, Example, check, name_of, rows

EXAMPLE = Example(
    Dropout,
    partial(nn.Dropout, RATE),
    names={"h": SIZES["h"]},
    reference=partial(ExplicitDropout, "it", RATE),
    after=follow,
)


@pytest.mark.parametrize("row", rows(Dropout), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


def test_style_takes_only_dropout() -> None:
    with pytest.raises(ValueError, match=r"0: Dropout takes a torch\.nn\.Dropout, and this is a Linear"):
        fabric_tp.from_plan({"0": Dropout()}).check(nn.Sequential(nn.Linear(4, 4)), tensor_parallel_size=1)


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="layout='heads' is not known"):
        Dropout("heads")  # type: ignore[arg-type]


@pytest.mark.parametrize("model", MODELS)
def test_one_device_is_a_plain_model_with_explicit_masks(one_device, model) -> None:
    plain = MODELS[model]()
    for name, module in list(plain.named_modules()):
        if isinstance(module, nn.Dropout):
            owner, _, own = name.rpartition(".")
            setattr(plain.get_submodule(owner), own, ExplicitDropout(name, module.p))
    loss = next_token_loss(plain(samples(0)), samples(0))
    loss.backward()
    result = {"loss": loss.detach(), **{name: p.grad for name, p in plain.named_parameters() if p.grad is not None}}
    expected = {name: each for name, each in one_device(MODELS[model]).items() if name.endswith("step 0")}
    assert worst({f"{name} of step 0": each for name, each in result.items()}, expected) < TOLERANCE


@pytest.mark.swept(lambda p: p["sizes"] != (1, 2) and (p["sizes"], p["model"]) != ((2, 2), "everywhere"))
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_training_is_that_of_one_device(pool, one_device, model, sizes) -> None:
    result = pool(sizes[0] * sizes[1])(train, MODELS[model], {}, sizes)
    assert worst(result, one_device(MODELS[model])) < TOLERANCE


@pytest.mark.swept(lambda p: p["model"] != "everywhere")
@pytest.mark.parametrize("model", MODELS)
def test_without_sequence_parallel(pool, one_device, model) -> None:
    result = pool(2)(train, MODELS[model], {"sequence_parallel": False}, (1, 2))
    assert worst(result, one_device(MODELS[model])) < TOLERANCE


@pytest.mark.parametrize("model", ["everywhere", "adapters"])
def test_replicated_attention(pool, one_device, model) -> None:
    result = pool(2)(train, MODELS[model], {"replicate_attention": True}, (1, 2))
    assert worst(result, one_device(MODELS[model])) < TOLERANCE


@pytest.mark.swept(lambda p: p["sizes"] != (1, 2))
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 2)], ids=str)
def test_micro_batches(pool, one_device, sizes) -> None:
    result = pool(sizes[0] * sizes[1])(train, everywhere, {}, sizes, micro_batches=4)
    assert worst(result, one_device(everywhere)) < TOLERANCE


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["none", "full"])
def test_compile(pool, one_device, kind) -> None:
    options = {"compile": True, "activation_checkpointing": kind}
    result = pool(2)(compiled_by, PARTITIONED, train, residual, options, (1, 2))
    assert worst(result, one_device(residual)) < TOLERANCE


def test_mixture_of_experts(pool) -> None:
    """The experts' tokens are the same on all tensor-parallel ranks, and so are their masks."""
    build = partial(adapters, "Mixtral-8x7B-v0.1")
    result = pool(2)(train, build, {"activation_checkpointing": "full"}, (1, 2))
    assert worst(result, pool(1)(train, build, {}, (1, 1))) < TOLERANCE


def set_layout(name: str, layout: Any, model: nn.Module) -> None:
    for path, module in model.named_modules():
        if path.endswith(name):
            module.parallelized.style = Dropout(layout)  # type: ignore[union-attr, assignment]


def number_samples_by_rank(model: nn.Module) -> None:
    position = model.get_submodule("embedding_dropout").position
    assert isinstance(position, RunPosition)
    position.data_parallel_rank, position.data_parallel_size = 0, 1


@pytest.mark.parametrize(
    ("sizes", "mutation"),
    [
        ((1, 2), partial(set_layout, "last", "replicate")),
        ((1, 2), partial(set_layout, "hidden", "replicate")),
        ((1, 2), partial(set_layout, "probabilities", "replicate")),
        ((1, 2), partial(set_layout, "residual", "features")),
        ((2, 1), number_samples_by_rank),
    ],
    ids=["last", "hidden", "probabilities", "residual", "samples"],
)
def test_notices_mutations(pool, one_device, sizes, mutation) -> None:
    result = pool(2)(train, everywhere, {}, sizes, break_model=mutation)
    assert worst(result, one_device(everywhere)) > 10 * TOLERANCE


def test_feed_forward(pool) -> None:
    expected, result = (pool(size)(feed_forward_output, (1, size)) for size in (1, 2))
    assert (result - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert (expected == 0).any()


def feed_forward_output(sizes: tuple[int, int]) -> Tensor:
    torch.manual_seed(0)
    model = fabric_tp.feed_forward()(nn.Sequential(DropoutFeedForward(64, 96), nn.Dropout(RATE)), mesh(*sizes))
    return model(torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(1))).detach()
