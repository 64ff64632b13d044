"""PEFT's LoRA on models of Transformers: adapters follow the layer that they change."""

from __future__ import annotations

from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import fabric_tp
from fabric_tp.architectures import recognise
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import randomize, small_causal
from tests.parity import assert_equal, differences_of
from tests.test_mutations import by_keyword, drop_gradient_sum

TYPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {},
    "mixtral": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "phi3": {},  # queries, keys and values in one layer, gate and up in one
    "gpt2": {},  # weights as (inputs, outputs)
    "gpt_neox": {},  # by groups
    "deepseek_v3": {
        "target_modules": r".*\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    },  # latent attention
    "gemma2": {"num_attention_heads": 6, "num_key_value_heads": 2},  # more heads than four ranks divide
}
CORE = ["llama"]


def build(model_type: str, target_modules: Any = "all-linear", dropout: float = 0.0, **options: Any) -> nn.Module:
    model = small_causal(model_type, **options)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=target_modules, lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(peft.get_peft_model(model, config))


@pytest.mark.swept(lambda p: p["model_type"] not in CORE)
@pytest.mark.parametrize("model_type", TYPES)
def test_equals_one_device(pool, model_type) -> None:
    """On four ranks, which share key and value heads where there are two."""
    assert_equal(pool, partial(build, model_type, **TYPES[model_type]), fabric_tp.auto(), (1, 4))


@pytest.mark.sweep
@pytest.mark.parametrize("options", [{"sequence_parallel": False}, {"activation_checkpointing": "full"}], ids=str)
def test_options(pool, options) -> None:
    model = partial(build, "llama", target_modules=["q_proj", "v_proj"])
    assert_equal(pool, model, fabric_tp.auto(**options), (2, 2), steps=3)


def test_a_model_that_adapters_were_added_to(pool) -> None:
    """``inject_adapter_in_model`` leaves the model what it was."""
    assert_equal(pool, injected, fabric_tp.auto(), (1, 2))


def injected() -> nn.Module:
    return build("llama").get_submodule("base_model.model")


def trained() -> dict[str, tuple[bool, tuple[int, ...]]]:
    model = fabric_tp.auto()(build("llama"), mesh(1, 2))
    return {
        name.removeprefix("base_model.model.model.layers.0."): (parameter.requires_grad, tuple(local.shape))
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor) and (local := parameter.to_local()) is not None
    }


def test_adapters_follow_their_layer(pool) -> None:
    shapes = pool(2)(trained)
    assert shapes["self_attn.q_proj.base_layer.weight"] == (False, (32, 64))
    assert shapes["self_attn.q_proj.lora_A.default.weight"] == (True, (4, 64))
    assert shapes["self_attn.q_proj.lora_B.default.weight"] == (True, (32, 4))
    assert shapes["self_attn.o_proj.lora_A.default.weight"] == (True, (4, 32))
    assert shapes["self_attn.o_proj.lora_B.default.weight"] == (True, (64, 4))


@pytest.mark.parametrize("part", [".q_proj.lora_A.default.", ".down_proj.lora_B.default."])
def test_a_missing_sum_is_noticed(pool, part) -> None:
    break_model = partial(by_keyword, partial(drop_gradient_sum, part))
    differences = differences_of(pool, partial(build, "llama"), fabric_tp.auto(), break_model=break_model)
    assert max(differences.values()) > 10 * TOLERANCE


@pytest.mark.sweep
def test_dropout_is_that_of_one_rank(pool) -> None:
    from tests.styles.dropout_runs import train, worst

    model = partial(build, "llama", dropout=0.2)
    assert worst(pool(2)(train, model, {}, (1, 2)), pool(2)(train, model, {}, (2, 1))) < TOLERANCE


def test_is_recognised() -> None:
    assert recognise(build("llama")).embedding == "base_model.model.model.embed_tokens"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head, the head, has an adapter"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens"),
        ({"use_dora": True, "target_modules": ["q_proj"]}, r"lora_magnitude_vector"),
        ({"lora_bias": True, "target_modules": ["o_proj"]}, r"o_proj\.lora_B\.default, of an adapter, has a bias"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, r"lm_head"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_is_refused(options, message) -> None:
    model = peft.get_peft_model(small_causal("llama"), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with pytest.raises(ValueError, match=message):
        fabric_tp.auto().check(model, tensor_parallel_size=2)


def test_arguments_that_are_refused_are_refused_there_as_well(pool) -> None:
    pool(2)(refuses)


def refuses() -> None:
    model = fabric_tp.auto()(build("llama"), mesh(1, 2))
    with pytest.raises(ValueError, match=r"logits_to_keep=1 "):
        model(torch.zeros(1, 4, dtype=torch.int64), logits_to_keep=1)
