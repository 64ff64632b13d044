"""Causal language models of Transformers, by family."""

from __future__ import annotations

import sys
from functools import partial

import pytest

import fabric_tp
from fabric_tp.parallelize import recognise
from fabric_tp.testing.small import TRANSFORMERS, small_transformers
from tests.parity import assert_equal

FAMILIES = [name for name in TRANSFORMERS if name != "Mixtral"]


@pytest.mark.parametrize("sizes", [(1, 2), (1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_family(pool, name, sizes) -> None:
    assert_equal(pool, partial(small_transformers, name), fabric_tp.auto(), sizes)


@pytest.mark.parametrize(
    "options",
    [{"sequence_parallel": False}, {"loss_parallel": False}, {"replicate_attention": True}],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("name", ["Llama, tied embeddings", "Phi3", "Olmo2"])
def test_options(pool, name, options) -> None:
    assert_equal(pool, partial(small_transformers, name), fabric_tp.auto(**options), (1, 2))


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Phi3", "Olmo2"])
def test_more_ranks_than_key_and_value_heads(pool, name) -> None:
    assert_equal(pool, partial(small_transformers, name, num_key_value_heads=2), fabric_tp.auto(), (1, 4))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_is_recognised(name) -> None:
    assert recognise(small_transformers(name)).name == "huggingface"


def test_refuses_experts_in_one_parameter() -> None:
    with pytest.raises(ValueError, match=r"mlp\.experts\.down_proj.*a parameter of 3 dimensions, such as all experts"):
        fabric_tp.auto().check(small_transformers("Mixtral"), tensor_parallel_size=2)


def test_transformers_is_not_installed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install fabric_tp\[hf\]"):
        small_transformers("Llama")
