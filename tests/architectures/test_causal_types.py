"""Types of Transformers' causal language models that are not in the table of families."""

from __future__ import annotations

from functools import partial

import pytest

import fabric_tp
from fabric_tp.architectures import recognise
from fabric_tp.testing.small import causal_types, small_causal
from tests.parity import assert_equal

TYPES = {
    "phi": "phi",
    "persimmon": "phi",
    "starcoder2": "huggingface",
    "glm4": "huggingface",
    "xglm": "xglm",
    "biogpt": "biogpt",
}


@pytest.mark.parametrize("model_type", TYPES)
def test_equals_one_device(pool, model_type) -> None:
    assert recognise(small_causal(model_type)).name == TYPES[model_type]
    assert_equal(pool, partial(small_causal, model_type), fabric_tp.auto(), (1, 2))


@pytest.mark.sweep
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("sizes", [(1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_other_meshes(pool, model_type, sizes, sequence_parallel) -> None:
    parallelize_fn = fabric_tp.auto(sequence_parallel=sequence_parallel)
    assert_equal(pool, partial(small_causal, model_type), parallelize_fn, sizes)


@pytest.mark.parametrize("rate", ["dropout", "activation_dropout", "layerdrop"])
@pytest.mark.parametrize("model_type", ["xglm", "biogpt"])
def test_dropout_without_a_module_is_refused(model_type, rate) -> None:
    named = "hidden_dropout_prob" if (model_type, rate) == ("biogpt", "dropout") else rate
    with pytest.raises(ValueError, match=rf"drops at the rates .*{rate}=0\.1.* set these rates to 0"):
        fabric_tp.auto().check(small_causal(model_type, **{named: 0.1}), tensor_parallel_size=2)


REFUSED = {
    "granitemoe": r"model\.layers\.0: A GraniteMoeDecoderLayer has no 'mlp'; it has",
    "llama4_text": r"model\.layers\.0: A Llama4TextDecoderLayer has no 'mlp'; it has",
    "minimax": r"model\.layers\.1: .* a MiniMaxLightningAttention has cannot be told: It has no",
    "mamba": "The architecture of this MambaForCausalLM is not known",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_not_covered_is_refused_by_name(model_type) -> None:
    assert model_type in causal_types()
    with pytest.raises(ValueError, match=REFUSED[model_type]) as refused:
        fabric_tp.auto().check(small_causal(model_type), tensor_parallel_size=2)
    assert "from_plan" in str(refused.value)
