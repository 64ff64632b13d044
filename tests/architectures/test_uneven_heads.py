"""More query heads than ranks divide: whole heads on each, of weights that are stored in even parts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from litgpt import GPT
from torch import nn

import fabric_tp
from fabric_tp.styles import FusedColwise, Rowwise
from fabric_tp.styles.heads import Heads
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import names, small_causal, small_config, small_gpt, small_lora
from tests.architectures.test_litgpt import LATENT, heads
from tests.parity import PARTITIONED, assert_equal, differences_of
from tests.styles.dropout_runs import train, worst

LITGPT: dict[str, tuple[str, dict[str, Any]]] = {
    "one head for each query": ("Llama-2-7b-hf", heads(6, 6)),
    "one key and value head, parallel residual": ("falcon-7b", heads(7, 1)),
    "grouped queries, biases": ("Qwen2.5-1.5B", heads(6, 2)),
    "norms of all heads": ("OLMo-2-1124-7B", heads(6, 6)),
    "norms of key heads across ranks": ("OLMo-2-1124-7B", heads(6, 2)),
    "latent attention": ("Llama-2-7b-hf", {**heads(6, 6), "latent_attention": LATENT}),
}
SIX = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 48}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "gpt_neox": SIX,  # by groups, of one head each
    "gpt2": {"n_head": 6, "n_embd": 48},  # weights as (inputs, outputs)
    "bloom": {"n_head": 6, "hidden_size": 48},  # a number for each head in an argument
    "gpt_oss": {"num_attention_heads": 6, "num_key_value_heads": 3},  # a parameter with a number for each head
    "afmoe": {"num_attention_heads": 6, "num_key_value_heads": 3},  # gates after attention
    "deepseek_v3": {"num_attention_heads": 6, "num_key_value_heads": 6},  # latent attention
    "bitnet": SIX,  # a norm over all heads' outputs
}
CORE = ["one head for each query", "grouped queries, biases"]


@pytest.mark.swept(lambda p: p["structure"] not in CORE)
@pytest.mark.parametrize("structure", LITGPT)
def test_litgpt(pool, structure) -> None:
    """On four ranks, of which the last has one head or none."""
    name, overrides = LITGPT[structure]
    assert_equal(pool, partial(small_gpt, small_config(name, **overrides)), fabric_tp.litgpt(), (1, 4))


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_transformers(pool, model_type) -> None:
    assert_equal(pool, partial(small_causal, model_type, **TRANSFORMERS[model_type]), fabric_tp.auto(), (1, 4))


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", ["gpt_oss", "gpt2"])
def test_with_data_parallelism(pool, model_type) -> None:
    sizes = {"gpt_oss": {"num_attention_heads": 3, "num_key_value_heads": 1}, "gpt2": {"n_head": 3, "n_embd": 48}}
    options = {"sequence_parallel": False, "activation_checkpointing": "full"}
    model = partial(small_causal, model_type, **sizes[model_type])
    assert_equal(pool, model, fabric_tp.auto(**options), (2, 2), steps=3)


@pytest.mark.swept(lambda p: p["adapted"] == "every layer")
@pytest.mark.parametrize("adapted", ["every layer", "query and value"])
def test_lora(pool, adapted) -> None:
    assert_equal(pool, partial(small_lora, "pythia-160m", adapted, **heads(3, 3)), fabric_tp.litgpt(), (1, 2))


@pytest.mark.sweep
def test_compiled(pool) -> None:
    model = partial(small_gpt, small_config("Llama-2-7b-hf", **heads(3, 3)))
    assert_equal(pool, model, fabric_tp.litgpt(compile=True), (1, 2), backend=PARTITIONED)


def test_masks_are_those_of_one_rank(pool) -> None:
    rates = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_implementation": "eager"}
    model = partial(small_causal, "gpt2", n_head=3, n_embd=48, **rates)
    assert worst(pool(2)(train, model, {}, (1, 2)), pool(2)(train, model, {}, (2, 1))) < TOLERANCE


def as_if_cut(model: nn.Module) -> None:
    """Each rank computes with the rows it has, as far as these go."""
    for module in model.modules():
        this = getattr(module, "parallelized", None)
        if this and isinstance(this.style, (FusedColwise, Rowwise)) and this.style.heads:
            this.style.uncut = _Shifted(this.style.heads.query, this.style.heads.key_value)


class _Shifted(Heads):
    def complete(self, shard, group, dim, features):
        return super().complete(shard, group, dim, features).roll(1, dim)


def test_rows_of_another_head_are_noticed(pool) -> None:
    model = partial(small_gpt, small_config("Llama-2-7b-hf", **heads(3, 3)))
    differences = differences_of(pool, model, fabric_tp.litgpt(), break_model=as_if_cut)
    assert differences["output"] > 10 * TOLERANCE


def test_all_of_litgpts_configs_work_on_eight_ranks() -> None:
    for name in names():
        with torch.device("meta"):
            model = GPT(small_config(name))
        fabric_tp.litgpt().check(model, tensor_parallel_size=8)


def stored() -> tuple[int, ...]:
    model = fabric_tp.litgpt()(small_gpt(small_config("Llama-2-7b-hf", **heads(3, 3))), mesh(1, 2))
    parameter: Any = model.get_parameter("transformer.h.0.attn.qkv.q.weight")
    return (*parameter.shape, *parameter.to_local().shape)


def test_what_ranks_store_is_even_and_means_what_it_did(pool) -> None:
    assert pool(2)(stored) == (24, 24, 12, 24)
