"""Blocks under torch.compile: one graph each, that keeps for the backward what blocks that are not compiled keep."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from litgpt import GPT
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fabric_tp
from tests.architectures.test_litgpt import built
from tests.measure.test_memory_of_blocks import kept
from tests.parity import PARTITIONED, assert_equal

RANKS, LENGTH, WIDTH = 8, 512, 512


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tensor_parallel",))
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def compiler() -> None:
    torch.compiler.reset()


def gpt(name: str, layers: int) -> nn.Module:
    sizes = {"n_embd": WIDTH, "n_head": 32, "intermediate_size": 1792, "padded_vocab_size": 1024}
    if name.startswith("Llama-3"):
        sizes["n_query_groups"] = 8
    return GPT.from_name(name, n_layer=layers, **sizes)


CHECKPOINTED = [{"activation_checkpointing": kind} for kind in ("full", "selective")]


@pytest.mark.swept(
    lambda p: p["name"] != "Llama-3-8B" or p["options"] in ({"lean": False, "regather": False}, CHECKPOINTED[0])
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("Llama-3-8B", each) for each in ({}, {"lean": False, "regather": False}, *CHECKPOINTED)),
        ("phi-2", {"sequence_parallel": False}),
        *((name, {}) for name in ("pythia-14m", "Gemma-2-2b", "OLMo-2-1124-7B")),
        *(("Gemma-2-2b", each) for each in CHECKPOINTED),
    ],
    ids=str,
)
def test_a_block_is_one_graph(mesh, monkeypatch, name, options) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))  # or it raises
    model = fabric_tp.litgpt(compile=True, **options)(gpt(name, 1), mesh)
    logits = model(torch.zeros(1, LENGTH, dtype=torch.int64))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.fixture
def partitioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is chosen as it is by default, and no code is generated for it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=PARTITIONED))


def kept_per_layer(mesh: DeviceMesh, **options: Any) -> float:
    """In multiples of s*b*h/t bytes, of a model in bf16."""
    parallelize = fabric_tp.litgpt(**options)
    one, three = (kept(parallelize(gpt("Llama-3-8B", n).to(torch.bfloat16), mesh), LENGTH) for n in (1, 3))
    return (three - one) / 2 / (LENGTH * WIDTH / RANKS)


def test_all_blocks_share_one_graph(mesh, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    before = counters["stats"]["unique_graphs"]
    fabric_tp.litgpt(compile=True)(gpt("Llama-3-8B", 12), mesh)(torch.zeros(1, LENGTH, dtype=torch.int64))
    assert counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.sweep
def test_keeps_what_it_keeps_uncompiled(mesh, partitioned) -> None:
    eager = kept_per_layer(mesh)
    assert kept_per_layer(mesh, compile=True) == eager
    assert kept_per_layer(mesh, compile=True, regather=False) == eager + 4 * RANKS  # two gathered inputs of 2 bytes


@pytest.mark.swept(lambda p: p["kind"] == "full")
@pytest.mark.parametrize(
    ("kind", "multiple"),
    [
        ("full", 2),  # the residual stream
        ("selective", 2 + 2 + 4 * 32 / WIDTH + 2),  # attention's result with a number for each head; its reduction's
    ],
)
def test_activation_checkpointing(mesh, partitioned, caplog, kind, multiple) -> None:
    kept = kept_per_layer(mesh, compile=True, activation_checkpointing=kind)
    random_state = torch.get_rng_state().nbytes / (LENGTH * WIDTH / RANKS)
    assert kept == pytest.approx(multiple, abs=random_state)
    assert "context_fn" not in caplog.text


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("structure", "kind", "sizes"),
    [
        ("softcapping, sliding window, post-norms", "selective", (1, 2)),
        ("parallel residual, shared norm, biases, head bias", "full", (2, 2)),
        ("shared experts, grouped router, a dense layer", "full", (1, 2)),  # no block is one graph
    ],
)
def test_equals_one_device(pool, structure, kind, sizes) -> None:
    parallelize_fn = fabric_tp.litgpt(compile=True, activation_checkpointing=kind)
    assert_equal(pool, built(structure), parallelize_fn, sizes, backend=PARTITIONED)
