"""Causal language models of Transformers, by family."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fabric_tp
from fabric_tp.architectures import GPT_NEOX, recognise
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.small import TRANSFORMERS, small_causal, small_transformers
from tests.parity import assert_equal, differences_of

MESHES = [(1, 4), (2, 2)]
FAMILIES = [name for name in TRANSFORMERS if name != "Mixtral"]


@pytest.mark.swept(lambda p: p["name"] in list(FAMILIES)[1::2])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(pool, name) -> None:
    assert_equal(pool, partial(small_transformers, name), fabric_tp.auto(), (1, 2))


@pytest.mark.swept(lambda p: p["name"] != "Gemma3")
@pytest.mark.parametrize(("name", "sizes"), [(name, MESHES[i % 2]) for i, name in enumerate(FAMILIES)])
def test_family_on_four_ranks(pool, name, sizes) -> None:
    """Each on one mesh; ``python -m fabric_tp.testing huggingface --tensor_parallel_size 4`` has all types."""
    assert_equal(pool, partial(small_transformers, name), fabric_tp.auto(), sizes)


@pytest.mark.swept(lambda p: p["name"] == "Phi3")
@pytest.mark.parametrize(
    "options",
    [{"sequence_parallel": False}, {"loss_parallel": False}, {"replicate_attention": True}],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("name", ["Llama, tied embeddings", "Phi3", "Olmo2"])
def test_options(pool, name, options) -> None:
    assert_equal(pool, partial(small_transformers, name), fabric_tp.auto(**options), (1, 2))


@pytest.mark.swept(lambda p: p["name"] in ("Qwen2", "Phi3"))
@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Phi3", "Olmo2"])
def test_more_ranks_than_key_and_value_heads(pool, name) -> None:
    assert_equal(pool, partial(small_transformers, name, num_key_value_heads=2), fabric_tp.auto(), (1, 4))


def test_embedding_that_scales_what_it_looks_up(pool) -> None:
    """Its scale is a function of the config: 4 heads and no head_dim is another one than above."""
    few = partial(small_transformers, "Gemma3", num_attention_heads=4, num_key_value_heads=2)
    assert_equal(pool, few, fabric_tp.auto(), (1, 2))


def drop_scale(model: nn.Module) -> None:
    """What the embedding did before it computed with the module's own forward."""
    embedding: Any = model.get_submodule("model.embed_tokens")
    embedding.embed_scale = torch.ones(())


def test_notices_a_dropped_scale(pool) -> None:
    build = partial(small_transformers, "Gemma3")
    worst = differences_of(pool, build, fabric_tp.auto(), break_model=drop_scale)
    assert max(worst.values()) > 10 * TOLERANCE


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_is_recognised(name) -> None:
    expected = "gpt_neox" if name.startswith("GPT-NeoX") else "huggingface"
    assert recognise(small_transformers(name)).name == expected


def test_transformers_is_not_installed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install fabric_tp\[hf\]"):
        small_transformers("Llama")


def test_dropout_of_nothing_between_embedding_and_blocks() -> None:
    """What it sees is not known, and does not matter while its rate is zero."""
    fabric_tp.auto().check(small_transformers("GPT-NeoX"), tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"gpt_neox\.emb_dropout is a Dropout between the embedding"):
        fabric_tp.auto().check(small_transformers("GPT-NeoX", hidden_dropout=0.1), tensor_parallel_size=2)


def test_rows_by_group_need_ranks_that_divide_the_groups() -> None:
    model = small_causal("falcon", new_decoder_architecture=True, num_kv_heads=4)
    with pytest.raises(ValueError, match=r"does not divide the 4 groups of query heads by which the rows of query_key"):
        fabric_tp.auto().check(model, tensor_parallel_size=8)


def consecutive(*, model: nn.Module) -> fabric_tp.Parallelize:
    """GPT-NeoX declared as if its fused rows lay one part after the other: no size is wrong."""
    block = GPT_NEOX.block
    assert block is not None
    fused = {name: replace(each, layout="consecutive") for name, each in block.attention.fused.items()}
    wrong = replace(GPT_NEOX, block=replace(block, attention=replace(block.attention, fused=fused)))
    parallelize_fn = fabric_tp.Parallelize(architecture=wrong)
    parallelize_fn.check(model, tensor_parallel_size=2)
    return parallelize_fn


def test_notices_the_wrong_layout_of_a_fused_layer(pool) -> None:
    build = partial(small_transformers, "GPT-NeoX")
    worst = differences_of(pool, build, consecutive(model=build()))
    assert max(worst.values()) > 10 * TOLERANCE
