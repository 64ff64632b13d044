"""Plans that are derived from an architecture."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import fabric_tp
from fabric_tp.architectures import recognise
from fabric_tp.styles import ShardHeads, Unsharded
from fabric_tp.testing.small import small_causal
from tests.models import FeedForward, Llama, build

LITGPT_KEYS = {
    "transformer.wte",
    "transformer.h.*.norm_1",
    "transformer.h.*.norm_2",
    "transformer.h.*.attn",
    "transformer.h.*.attn.qkv",
    "transformer.h.*.attn.proj",
    "transformer.h.*.mlp",
    "transformer.h.*.mlp.proj",
    "transformer.ln_f",
    "lm_head",
}
LLAMA_KEYS = {
    "tok_embeddings",
    "layers.*.attention_norm",
    "layers.*.ffn_norm",
    "layers.*.attention",
    *(f"layers.*.attention.{name}" for name in ("wq", "wk", "wv", "wo")),
    "layers.*.feed_forward",
    *(f"layers.*.feed_forward.{name}" for name in ("w1", "w2", "w3")),
    "norm",
    "output",
}
KEYS = {
    "Llama-3-8B": LITGPT_KEYS | {"transformer.h.*.mlp.fc_1", "transformer.h.*.mlp.fc_2"},
    "pythia-14m": LITGPT_KEYS | {"transformer.h.*.mlp.fc"},
    "llama": LLAMA_KEYS,
    "feed_forward": {"", "w1", "w2", "w3"},
}


@pytest.mark.parametrize("name", KEYS)
def test_keys(name) -> None:
    assert set(fabric_tp.auto().plan(build(name), tensor_parallel_size=2)) == KEYS[name]


def test_layers_may_be_a_list() -> None:
    model: Any = Llama()
    model.layers = nn.ModuleList(model.layers.values())
    assert set(fabric_tp.llama().plan(model, tensor_parallel_size=2)) == LLAMA_KEYS


def test_feed_forwards_inside_a_model() -> None:
    model = nn.ModuleDict({"one": FeedForward(8, 16), "other": FeedForward(8, 16)})
    plan = fabric_tp.feed_forward().plan(model, tensor_parallel_size=2)
    assert set(plan) == {f"{name}{layer}" for name in ("one", "other") for layer in ("", ".w1", ".w2", ".w3")}


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("Llama-3-8B", "litgpt"), ("pythia-14m", "litgpt"), ("llama", "llama"), ("feed_forward", "feed_forward")],
)
def test_auto_recognises(name, architecture) -> None:
    assert recognise(build(name)).name == architecture


def test_permission_is_used_where_it_is_needed() -> None:
    """Attention beside mixers is split; in a model of attention alone it is whole."""
    hybrid, llama = small_causal("jamba"), small_causal("llama")
    permitted = fabric_tp.auto(replicate_attention=True)
    plan = permitted.plan(hybrid, tensor_parallel_size=2)
    assert isinstance(plan["model.layers.0.mamba"], Unsharded)
    assert isinstance(plan["model.layers.1.self_attn"], ShardHeads)
    assert isinstance(permitted.plan(llama, tensor_parallel_size=2)["model.layers.*.self_attn"], Unsharded)
