"""Types of Transformers' causal language models that are not in the table of families."""

from __future__ import annotations

from functools import partial
from typing import Any

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


def test_dropout_without_a_module_is_refused() -> None:
    model: Any = small_causal("xglm")
    for layer in model.model.layers:
        layer.dropout = 0.1
    with pytest.raises(ValueError, match=r"draws dropout masks by itself.* Set the rates .* to 0"):
        fabric_tp.auto().check(model, tensor_parallel_size=2)


@pytest.mark.parametrize("model_type", ["granitemoe", "llama4_text", "minimax", "mamba"])
def test_what_is_not_covered_is_refused_by_name(model_type) -> None:
    assert model_type in causal_types()
    with pytest.raises(ValueError, match=r"from_plan"):
        fabric_tp.auto().check(small_causal(model_type), tensor_parallel_size=2)
