"""Which dropout of a model gets which style, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from torch import nn

import fabric_tp
from fabric_tp.parallelize import Parallelize
from fabric_tp.styles import Colwise, Dropout
from fabric_tp.testing.small import one_of_each_structure, small_transformers
from tests.styles.dropout_models import RATE, DropoutLlama, adapters, everywhere, seeded


def styles_of(parallelize: Parallelize, model: nn.Module, size: int = 2) -> dict[str, str]:
    plan = parallelize.plan(model, tensor_parallel_size=size)
    return {name: style.layout for name, style in plan.items() if isinstance(style, Dropout)}


def test_plan_of_a_hand_written_model() -> None:
    assert styles_of(fabric_tp.llama(), everywhere()) == {
        "embedding_dropout": "sequence",
        "layers.*.residual": "sequence",
        "layers.*.attention.probabilities": "features",
        "layers.*.attention.both": "features",
        "layers.*.feed_forward.hidden": "features",
        "layers.*.feed_forward.last": "features",
    }


def test_plan_of_adapters() -> None:
    assert styles_of(fabric_tp.litgpt(), adapters()) == {
        "lm_head.lora_dropout": "replicate",
        "transformer.h.*.attn.qkv.lora_dropout": "replicate",
        "transformer.h.*.attn.proj.lora_dropout": "features",
        "transformer.h.*.mlp.fc_1.lora_dropout": "replicate",
        "transformer.h.*.mlp.fc_2.lora_dropout": "replicate",
        "transformer.h.*.mlp.proj.lora_dropout": "features",
    }


@pytest.mark.parametrize("name", one_of_each_structure())
def test_every_dropout_of_adapters_has_a_style(name) -> None:
    model = adapters(name)
    fabric_tp.litgpt(replicate_attention=name == "falcon-7b").check(model, tensor_parallel_size=2)


def test_explain_shows_dropouts() -> None:
    text = fabric_tp.llama().explain(everywhere(), tensor_parallel_size=2)
    assert any("layers.*.feed_forward.hidden x 2" in line and "Dropout" in line for line in text.splitlines())


def test_ambiguous_width_is_refused() -> None:
    model = seeded(partial(DropoutLlama, hidden=128))
    message = r"hidden is a Dropout .* hidden features are 64 on each of 2 ranks.*from_plan\(plan\)"
    with pytest.raises(ValueError, match=message):
        fabric_tp.llama().check(model, tensor_parallel_size=2)
    fabric_tp.llama().check(model, tensor_parallel_size=4)


def test_advice_for_an_ambiguous_width_works() -> None:
    model = seeded(partial(DropoutLlama, hidden=128))
    plan = fabric_tp.auto().plan(model, tensor_parallel_size=1)
    plan["layers.*.feed_forward.hidden"] = Dropout("features")
    plan["layers.*.feed_forward.last"] = Dropout("sequence")
    fabric_tp.from_plan(plan, blocks="layers").check(model, tensor_parallel_size=2)


def test_unknown_place_is_refused() -> None:
    model: Any = small_transformers("Llama")
    model.model.dropout = nn.Dropout(RATE)
    with pytest.raises(ValueError, match=r"model\.dropout is a Dropout between the embedding.*sequence_parallel=False"):
        fabric_tp.auto().check(model, tensor_parallel_size=2)
    fabric_tp.auto(sequence_parallel=False).check(model, tensor_parallel_size=2)


@pytest.mark.parametrize("cls", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout])
def test_uncovered_dropout_is_refused(cls) -> None:
    model = nn.Sequential(nn.Linear(4, 4), cls(0.5))
    plan = fabric_tp.from_plan({"0": Colwise()})
    with pytest.raises(ValueError, match=rf"covers 1, a {cls.__name__} with p=0.5"):
        plan.check(model, tensor_parallel_size=2)
    plan.check(model, tensor_parallel_size=1)
    model[1].p = 0.0
    plan.check(model, tensor_parallel_size=2)
