"""Types of Transformers' causal language models that are not in the table of families."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fabric_tp
from fabric_tp.architectures import Architecture, recognise
from fabric_tp.architectures.huggingface import BART
from fabric_tp.styles.attention_heads import HeadsModule
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import LENGTH, VOCABULARY, causal_types, small_causal
from tests.parity import assert_equal, differences_of
from tests.styles.dropout_runs import train, worst
from tests.test_mutations import by_keyword, drop_gradient_sum

TYPES = {
    "phi": "phi",
    "persimmon": "phi",
    "starcoder2": "huggingface",
    "glm4": "huggingface",
    "xglm": "xglm",
    "biogpt": "biogpt",
    "qwen2_moe": "huggingface",  # a shared expert with a gate of its own
    "gpt_oss": "huggingface",  # each gate beside its up, biases, attention sinks
    "deepseek_v3": "huggingface",  # latent attention
    "deepseek_v2": "huggingface",  # its experts' module reads the router's weight
    "llama4_text": "llama4",
    "bert": "bert",
    "modernbert-decoder": "modernbert",
    "apertus": "huggingface",  # an activation with learned numbers
    "bart": "bart",  # a norm before the blocks, and none after them
    "opt": "bart",  # its blocks put the tokens in a row
    "bigbird_pegasus": "bigbird_pegasus",  # as BART, but the norm is after the blocks
    "whisper": "whisper",
    "trocr": "trocr",  # its forward measures the input
    "granitemoeshared": "granite_moe",  # modules with the parameters of all experts, and an MLP beside them
    "dbrx": "dbrx",  # queries, keys and values in one layer; experts who count their hidden features
    "phimoe": "huggingface",  # a router that draws random numbers
    "afmoe": "huggingface",  # a gate after attention; a parameter beside the router
    "bitnet": "huggingface",  # norms over all heads' outputs and over all hidden features
    "gpt2": "gpt2",  # weights as (inputs, outputs)
    "gpt_bigcode": "gpt2",  # one key and value head
    "gptj": "gptj",
    "gpt_neo": "gpt_neo",
    "gpt_neox_japanese": "gpt_neox_japanese",  # a bias that attention returns
    "bloom": "bloom",  # ALiBi
    "falcon": "bloom",
    "mpt": "mpt",
    "ctrl": "ctrl",  # attention takes its input three times
    "cpmant": "cpmant",  # learned biases of each head; a prompt before the tokens
}
WITH_MIXERS = {
    "qwen3_next": "huggingface",  # queries with gates
    "minimax": "huggingface",  # linear attention by attention's name
    "jamba": "jamba",
    "falcon_h1": "jamba",  # a state space beside attention
    "mamba2": "mamba",  # no MLP
    "nemotron_h": "nemotron_h",  # each block one part
    "recurrent_gemma": "recurrent_gemma",  # keeps states in its modules
    "rwkv": "rwkv",  # an MLP with a gate over its output
}
"""Blocks of which something splits in no way."""
CORE = ["gpt2", "bloom", "opt", "gpt_oss", "deepseek_v3", "qwen3_next"]
MESHES = [((1, 4), True), ((2, 2), False), ((1, 2), True)]
"""And whether the sequence is parallel: each type on one of them, and those of ``CORE`` on the last as well."""


def build(model_type: str, **overrides: Any) -> nn.Module:
    """In fp64 where a gradient is a sum over all activations of a layer: its rounding in fp32 is near the tolerance."""
    model = small_causal(model_type, **overrides)
    return model.double() if model_type == "apertus" else model


@pytest.mark.parametrize("model_type", TYPES | WITH_MIXERS)
def test_is_recognised(model_type) -> None:
    assert recognise(small_causal(model_type)).name == (TYPES | WITH_MIXERS)[model_type]


@pytest.mark.swept(lambda p: p["model_type"] in CORE[3:])
@pytest.mark.parametrize("model_type", CORE)
def test_equals_one_device(pool, model_type) -> None:
    parallelize_fn = fabric_tp.auto(replicate_attention=model_type in WITH_MIXERS)
    assert_equal(pool, partial(build, model_type), parallelize_fn, (1, 2))


@pytest.mark.parametrize(("model_type", "name"), [("bamba", "jamba"), ("lfm2_moe", "lfm2"), ("xlstm", "xlstm")])
def test_names_of_others_with_mixers(model_type, name) -> None:
    model = small_causal(model_type)
    assert recognise(model).name == name
    fabric_tp.auto(replicate_attention=True).check(model, tensor_parallel_size=2)


def test_heads_that_ranks_do_not_divide_beside_mixers(pool) -> None:
    model = partial(small_causal, "minimax", hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
    assert_equal(pool, model, fabric_tp.auto(replicate_attention=True), (1, 2))


@pytest.mark.parametrize("options", [{"word_embed_proj_dim": 32}, {"do_layer_norm_before": False}], ids=str)
def test_opt_with_other_ends_equals_one_device(pool, options) -> None:
    assert_equal(pool, partial(small_causal, "opt", **options), fabric_tp.auto(), (1, 2))


@pytest.mark.parametrize("regather", [True, False])
def test_tokens_in_a_row_may_be_any_number(pool, regather) -> None:
    tokens = torch.randint(VOCABULARY, (2, LENGTH - 1), generator=torch.Generator().manual_seed(0))
    parallelize_fn = fabric_tp.auto(regather=regather)
    assert_equal(pool, partial(small_causal, "opt"), parallelize_fn, (1, 2), inputs=tokens)


def test_tokens_in_a_row_need_to_be_described() -> None:
    block = BART.block
    assert block is not None
    wrong = replace(BART, block=replace(block, feed_forward=replace(block.feed_forward, takes_rows=False)))
    with pytest.raises(ValueError, match=r"model\.decoder\.layers\.0\.fc1 \(Linear\) cannot run on one of 2 ranks"):
        fabric_tp.Parallelize(architecture=wrong).check(small_causal("opt"), tensor_parallel_size=2)


def test_a_norm_at_another_place_is_refused() -> None:
    """Every output would be right, and the gradient of the norm would lack a sum."""
    model = small_causal("bigbird_pegasus")
    with pytest.raises(ValueError, match=r"layernorm_embedding sees a part of the sequence on each rank, and"):
        fabric_tp.Parallelize(architecture=BART).check(model, tensor_parallel_size=2)
    fabric_tp.Parallelize(architecture=BART, sequence_parallel=False).check(model, tensor_parallel_size=2)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("model_type", "sizes", "sequence_parallel"),
    [
        *((name, *MESHES[i % 2]) for i, name in enumerate(CORE)),
        *((name, *MESHES[i % 3]) for i, name in enumerate(TYPES | WITH_MIXERS) if name not in CORE),
    ],
)
def test_in_turn_on_all_meshes(pool, model_type, sizes, sequence_parallel) -> None:
    """``python -m fabric_tp.testing huggingface`` has all types on any mesh."""
    parallelize_fn = fabric_tp.auto(sequence_parallel=sequence_parallel, replicate_attention=model_type in WITH_MIXERS)
    assert_equal(pool, partial(build, model_type), parallelize_fn, sizes)


VARIANTS = {
    "Falcon of the new architecture": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4}),
    "Falcon with ALiBi": ("falcon", {"alibi": True, "attn_implementation": "eager"}),
    "GPT-BigCode by head": ("gpt_bigcode", {"multi_query": False}),
    "Bloom with the other residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
}
"""Options that change how attention computes, or how its fused layer lies."""


@pytest.mark.swept(lambda p: p["variant"].startswith("Falcon"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(pool, variant) -> None:
    model_type, options = VARIANTS[variant]
    assert_equal(pool, partial(build, model_type, **options), fabric_tp.auto(), (1, 2))


@pytest.mark.sweep
def test_masks_of_gpt2(pool) -> None:
    """On four ranks the MLP has as many hidden features on each as the model has, and its dropout sees the latter."""
    rates = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_implementation": "eager"}
    model = partial(build, "gpt2", **rates)
    assert worst(pool(4)(train, model, {}, (1, 4)), pool(2)(train, model, {}, (2, 1))) < TOLERANCE


def biases_of_the_first_heads(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, HeadsModule):
            module.parallelized.group = replace(module.parallelized.group, rank=0)


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "cpmant"])
def test_biases_of_other_heads_are_noticed(pool, model_type) -> None:
    model = partial(build, model_type)
    differences = differences_of(pool, model, fabric_tp.auto(), break_model=biases_of_the_first_heads)
    assert differences["output"] > 10 * TOLERANCE


def test_a_missing_sum_of_what_attention_returns_is_noticed(pool) -> None:
    break_model = partial(by_keyword, partial(drop_gradient_sum, ".attention.dense_bias."))
    model = partial(build, "gpt_neox_japanese")
    differences = differences_of(pool, model, fabric_tp.auto(), break_model=break_model)
    assert max(differences.values()) > 10 * TOLERANCE


@pytest.mark.parametrize("rate", ["dropout", "activation_dropout", "layerdrop"])
@pytest.mark.parametrize("model_type", ["xglm", "biogpt"])
def test_dropout_without_a_module_is_refused(model_type, rate) -> None:
    named = "hidden_dropout_prob" if (model_type, rate) == ("biogpt", "dropout") else rate
    with pytest.raises(ValueError, match=rf"drops at the rates .*{rate}=0\.1.* set these rates to 0"):
        fabric_tp.auto().check(small_causal(model_type, **{named: 0.1}), tensor_parallel_size=2)


def test_dropout_of_the_forward_itself_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.self_attn draws random numbers in its forward \(bernoulli"
    ):
        fabric_tp.auto().check(small_causal("seed_oss", residual_dropout=0.1), tensor_parallel_size=2)
    fabric_tp.auto().check(small_causal("seed_oss"), tensor_parallel_size=2)


def test_a_loss_of_the_routers_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config\.output_router_logits=True adds a loss of the routers' outputs\."):
        fabric_tp.auto().check(small_causal("qwen2_moe", output_router_logits=True), tensor_parallel_size=2)
    fabric_tp.auto().check(small_causal("qwen2_moe", output_router_logits=True), tensor_parallel_size=1)


def ask_for_the_last_logits() -> None:
    model = fabric_tp.auto(verify=False)(small_causal("gpt2"), mesh(1, 2))
    with pytest.raises(ValueError, match=r"logits_to_keep=1 cuts the sequence after each rank has got its part of it"):
        model(torch.zeros(1, 4, dtype=torch.int64), logits_to_keep=1)


def test_logits_of_a_part_of_the_sequence_are_refused(pool) -> None:
    """Each rank would keep some of its own part."""
    pool(2)(ask_for_the_last_logits)


def ask_for_router_logits() -> None:
    model = fabric_tp.auto(verify=False)(small_causal("olmoe"), mesh(1, 2))
    with pytest.raises(ValueError, match=r"output_router_logits=True adds a loss of the routers' outputs\."):
        model(torch.zeros(1, 4, dtype=torch.int64), output_router_logits=True)


def test_router_logits_in_a_call_are_refused(pool) -> None:
    pool(2)(ask_for_router_logits)


REFUSED = {
    "jetmoe": r"The architecture of this JetMoeForCausalLM is not known",
    "doge": r"No style of the plan covers the parameters model\.layers\.0\.input_residual",
    "zamba2": "The architecture of this Zamba2ForCausalLM is not known",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_not_covered_is_refused_by_name(model_type) -> None:
    assert model_type in causal_types()
    with pytest.raises(ValueError, match=REFUSED[model_type]) as refused:
        fabric_tp.auto().check(small_causal(model_type), tensor_parallel_size=2)
    assert "from_plan" in str(refused.value)


def without_of_block(architecture: Architecture, part: str, name: str) -> Architecture:
    assert architecture.block
    lacking: Any = replace(getattr(architecture.block, part), **{name: ()})
    return replace(architecture, block=replace(architecture.block, **{part: lacking}), tested=())


LACKING = {
    ("phimoe", "experts", "sampling"): r"model\.layers\.0\.mlp\.router draws random numbers in its forward",
    ("afmoe", "experts", "own"): r"No style of the plan covers the parameters model\.layers\.1\.mlp\.expert_bias",
    ("bitnet", "attention", "output_norms"): r"covers the parameters model\.layers\.0\.self_attn\.attn_sub_norm",
    ("bitnet", "feed_forward", "norms"): r"covers the parameters model\.layers\.0\.mlp\.ffn_sub_norm",
}


@pytest.mark.parametrize("lacking", LACKING, ids=" ".join)
def test_a_description_that_lacks_something_is_noticed(lacking) -> None:
    model_type, part, name = lacking
    model = small_causal(model_type)
    described = without_of_block(recognise(model), part, name)
    with pytest.raises(ValueError, match=LACKING[lacking]):
        fabric_tp.Parallelize(architecture=described).check(model, tensor_parallel_size=2)


def do_not_count_hidden_features() -> None:
    model = small_causal("dbrx")
    described = without_of_block(recognise(model), "experts", "hidden_sizes")
    with pytest.raises(ValueError, match=r"transformer\.blocks\.0\.ffn\.experts .* cannot run on one of 2 ranks"):
        fabric_tp.Parallelize(architecture=described)(model, mesh(1, 2))


def test_sizes_that_are_not_described_are_noticed(pool) -> None:
    pool(2)(do_not_count_hidden_features)


def test_what_cannot_be_split_is_refused_without_permission() -> None:
    named = r"model\.layers\.1\.self_attn, a MiniMaxLightningAttention, cannot be split .* replicate_attention=True"
    with pytest.raises(ValueError, match=named):
        fabric_tp.auto().check(small_causal("minimax"), tensor_parallel_size=2)
    fabric_tp.auto().check(small_causal("minimax"), tensor_parallel_size=1)
