"""litgpt.GPT, by structure: output, loss, every gradient and the weights after a step equal those of one device."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from litgpt import adapter, adapter_v2
from torch import nn

import fabric_tp
from fabric_tp.architectures import recognise
from fabric_tp.testing import assert_replicas_in_sync, next_token_loss
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import small_config, small_gpt
from tests.models import LENGTH, VOCABULARY
from tests.parity import assert_equal

LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12}
DEEPSEEK = {
    "mlp_class_name": "LLaMAMoE",
    "n_expert": 4,
    "n_expert_per_token": 2,
    "n_shared_expert": 1,
    "n_expert_groups": 2,
    "n_topk_groups": 1,
    "n_topk_scores_per_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}


def heads(query: int, key_value: int) -> dict[str, int]:
    return {"n_head": query, "n_query_groups": key_value, "n_embd": 8 * query}


STRUCTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped queries": ("Llama-3.1-8B", heads(8, 4)),
    "one head for each query": ("Llama-2-7b-hf", heads(8, 8)),
    "one key and value head, scaled embeddings": ("Gemma-2b", {}),
    "two key and value heads": ("tiny-llama-1.1b", heads(8, 2)),
    "groups across ranks": ("phi-4", {}),
    "sliding window": ("Mistral-7B-v0.1", heads(8, 4)),
    "norms of heads": ("Qwen3-0.6B", {}),
    "norms of heads, local and global positions": ("Gemma-3-4b-it", {}),
    "norms of one key head": ("Gemma-3-1b-it", {}),
    "norms of all heads": ("OLMo-2-1124-7B", heads(8, 8)),
    "norms of two key heads": ("OLMo-2-1124-7B", heads(8, 2)),
    "norms of key heads across ranks": ("OLMo-2-1124-7B", heads(24, 6)),
    "biases of queries, keys and values": ("Qwen2.5-1.5B", {}),
    "softcapping, sliding window, post-norms": ("Gemma-2-2b", {}),
    "parallel residual": ("falcon-40b", heads(16, 4)),
    "parallel residual, biases": ("pythia-14m", {"n_head": 8}),
    "parallel residual, shared norm": ("falcon-7b", heads(8, 1)),
    "parallel residual, shared norm, biases, head bias": ("phi-2", heads(8, 8)),
    "norms without parameters": ("OLMo-1B-hf", heads(8, 8)),
    "experts": ("Mixtral-8x7B-v0.1", heads(8, 4)),
    "experts, norms of heads": ("Qwen3-30B-A3B", {"n_head": 8}),
    "shared experts, grouped router, a dense layer": ("Llama-3-8B", {**heads(8, 4), **DEEPSEEK}),
    "latent attention": ("Llama-2-7b-hf", {**heads(8, 8), "latent_attention": LATENT}),
    "latent attention and experts": ("Llama-2-7b-hf", {**heads(8, 8), **DEEPSEEK, "latent_attention": LATENT}),
}


def built(structure: str) -> partial[nn.Module]:
    name, overrides = STRUCTURES[structure]
    return partial(small_gpt, small_config(name, **overrides))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structure(pool, structure) -> None:
    assert_equal(pool, built(structure), fabric_tp.litgpt(), (1, 2))


@pytest.mark.sweep
@pytest.mark.parametrize(
    "structure",
    [
        "two key and value heads",
        "groups across ranks",
        "norms of one key head",
        "norms of all heads",
        "norms of key heads across ranks",
        "parallel residual",
        "shared experts, grouped router, a dense layer",
        "latent attention and experts",
    ],
)
def test_structure_on_four_ranks(pool, structure) -> None:
    """Those that lie otherwise there; ``python -m fabric_tp.testing litgpt --tensor_parallel_size 4`` has all."""
    assert_equal(pool, built(structure), fabric_tp.litgpt(), (1, 4))


@pytest.mark.swept(lambda p: p["structure"] != "experts")
@pytest.mark.parametrize(
    "structure",
    [
        "norms of one key head",
        "norms of all heads",
        "softcapping, sliding window, post-norms",
        "parallel residual, shared norm, biases, head bias",
        "experts",
        "latent attention and experts",
    ],
)
def test_structure_with_data_parallelism(pool, structure) -> None:
    assert_equal(pool, built(structure), fabric_tp.litgpt(), (2, 2))


WHOLE_SEQUENCE, WHOLE_LOGITS = {"sequence_parallel": False}, {"loss_parallel": False}


@pytest.mark.swept(lambda p: p["sizes"] == (1, 4))
@pytest.mark.parametrize(
    ("structure", "sizes", "options"),
    [
        ("one key and value head, scaled embeddings", (1, 2), WHOLE_SEQUENCE),
        ("one key and value head, scaled embeddings", (1, 2), WHOLE_LOGITS),
        ("groups across ranks", (1, 4), WHOLE_SEQUENCE),
        ("norms of heads", (1, 2), {**WHOLE_SEQUENCE, **WHOLE_LOGITS}),
        ("norms of two key heads", (1, 4), WHOLE_SEQUENCE),
        ("parallel residual, shared norm, biases, head bias", (1, 2), WHOLE_SEQUENCE),
        ("parallel residual, shared norm, biases, head bias", (1, 2), WHOLE_LOGITS),
        ("shared experts, grouped router, a dense layer", (1, 2), WHOLE_SEQUENCE),
        ("latent attention", (1, 2), WHOLE_SEQUENCE),
    ],
    ids=str,
)
def test_options(pool, structure, sizes, options) -> None:
    assert_equal(pool, built(structure), fabric_tp.litgpt(**options), sizes)


@pytest.mark.swept(lambda p: p["sizes"] != (1, 2))
@pytest.mark.parametrize(
    ("sizes", "sequence_parallel"), [((1, 2), True), ((1, 2), False), ((1, 4), False), ((2, 2), True)], ids=str
)
def test_replicated_attention(pool, sizes, sequence_parallel) -> None:
    parallelize_fn = fabric_tp.litgpt(replicate_attention=True, sequence_parallel=sequence_parallel)
    assert_equal(pool, partial(small_gpt, small_config("falcon-7b")), parallelize_fn, sizes)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_is_recognised(structure) -> None:
    assert recognise(built(structure)()).name == "litgpt"


# Tied embeddings.


def tied(name: str = "Gemma-2b") -> nn.Module:
    model: Any = small_gpt(small_config(name))
    model.transformer.wte.weight = model.lm_head.weight
    return model


@pytest.mark.parametrize(("sizes", "sequence_parallel"), [((1, 2), True), ((2, 2), False)], ids=str)
def test_tied_embeddings(pool, sizes, sequence_parallel) -> None:
    assert_equal(pool, tied, fabric_tp.litgpt(sequence_parallel=sequence_parallel), sizes, steps=3)


def has_one_optimizer_state(sizes: tuple[int, int]) -> None:
    reference = tied()
    model: Any = fabric_tp.litgpt()(copy.deepcopy(reference), mesh(*sizes))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    next_token_loss(model(tokens), tokens).backward()
    optimizer.step()
    assert model.transformer.wte.weight is model.lm_head.weight
    # The fused qkv counts as three parameters in each of the two layers.
    assert len(optimizer.state) == len(list(reference.parameters())) + 2 * 2
    assert_replicas_in_sync(model)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_tied_embeddings_have_one_optimizer_state(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(has_one_optimizer_state, sizes)


# What is refused.


@pytest.mark.parametrize(
    ("family", "parameter"), [(adapter, "gating_factor"), (adapter_v2, "adapter_bias")], ids=["adapter", "adapter_v2"]
)
def test_refuses_other_adapters_than_lora(family, parameter) -> None:
    model = family.GPT(small_config("Llama-3-8B", family.Config, adapter_start_layer=0))
    with pytest.raises(ValueError, match=rf"{parameter}.*are not part of litgpt\.GPT or litgpt\.lora\.GPT"):
        fabric_tp.auto().check(model, tensor_parallel_size=2)
