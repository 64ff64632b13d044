"""What Transformers' own plan splits is split here as well."""

from __future__ import annotations

import pytest

import fabric_tp
from fabric_tp.styles import Replicated
from fabric_tp.testing.small import small_causal
from fabric_tp.testing.tp_plan import left_whole


@pytest.mark.parametrize("model_type", ["llama", "phi3", "mixtral", "deepseek_v3", "gpt_neox"])
def test_nothing_is_left_whole(model_type) -> None:
    model = small_causal(model_type)
    assert model.tp_plan
    assert left_whole(fabric_tp.auto().plan(model, tensor_parallel_size=2), model) == []


def test_what_is_left_whole_is_named() -> None:
    model = small_causal("llama")
    plan = dict(fabric_tp.auto().plan(model, tensor_parallel_size=2))
    changed = {name: Replicated() if name.endswith((".up_proj", ".o_proj")) else style for name, style in plan.items()}
    assert left_whole(changed, model) == ["model.layers.*.self_attn.o_proj", "model.layers.*.mlp.up_proj"]
