"""BERT and its relatives: what is the same in all, and what only some have."""

from __future__ import annotations

from functools import partial

import pytest
from torch import nn

import fabric_tp
from fabric_tp.styles import Dropout
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.small import small_causal
from tests.parity import assert_equal, differences_of
from tests.test_mutations import drop_gradient_sum

BERT = partial(small_causal, "bert")
RELATIVES = (
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta-xl",
    "xmod",
)


@pytest.mark.parametrize("model_type", RELATIVES)
def test_every_parameter_has_a_style(model_type) -> None:
    plan = fabric_tp.auto().plan(small_causal(model_type), tensor_parallel_size=2)
    assert any(name.endswith(".encoder.layer.*.attention.output.dense") for name in plan)


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", RELATIVES)
def test_equals_one_device(pool, model_type) -> None:
    assert_equal(pool, partial(small_causal, model_type), fabric_tp.auto(), (1, 2))


def test_output_of_a_replicated_attention(pool) -> None:
    assert_equal(pool, BERT, fabric_tp.auto(replicate_attention=True), (1, 2))


def test_vocabulary_that_the_ranks_do_not_divide(pool) -> None:
    assert_equal(pool, partial(small_causal, "bert", vocab_size=97), fabric_tp.auto(), (1, 2))


def lose(layer: str, model: nn.Module) -> None:
    drop_gradient_sum(layer, model=model)


@pytest.mark.parametrize("layer", [".attention.output.dense.bias.", ".transform.dense.", ".0.output.LayerNorm."])
def test_notices_a_lost_sum_of(pool, layer) -> None:
    worst = differences_of(pool, BERT, fabric_tp.auto(), break_model=partial(lose, layer))
    assert max(worst.values()) > 10 * TOLERANCE


def test_where_dropouts_are() -> None:
    plan = fabric_tp.auto().plan(small_causal("bert", hidden_dropout_prob=0.1), tensor_parallel_size=2)
    assert {name: style.layout for name, style in plan.items() if isinstance(style, Dropout)} == {
        "bert.embeddings.dropout": "replicate",
        "bert.encoder.layer.*.attention.self.dropout": "features",
        "bert.encoder.layer.*.attention.output.dropout": "sequence",
        "bert.encoder.layer.*.output.dropout": "sequence",
    }


def test_pieces_of_the_sequence_are_refused() -> None:
    model = small_causal("bert", chunk_size_feed_forward=4)
    with pytest.raises(ValueError, match=r"layer\.0 cuts the sequence into pieces \(chunk_size_feed_forward=4\)"):
        fabric_tp.auto().check(model, tensor_parallel_size=2)
    fabric_tp.auto(sequence_parallel=False).check(model, tensor_parallel_size=2)
    fabric_tp.auto().check(model, tensor_parallel_size=1)


def test_block_sparse_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer\.0: .*'block_sparse' .* Set attention_type='original_full'"):
        fabric_tp.auto().check(small_causal("big_bird", attention_type="block_sparse"), tensor_parallel_size=2)


def test_cross_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No style of the plan covers the parameters .*crossattention"):
        fabric_tp.auto().check(small_causal("bert", add_cross_attention=True), tensor_parallel_size=2)
