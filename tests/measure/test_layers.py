"""A model of many blocks is counted by a few of them."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest

import fabric_tp
from fabric_tp.architectures.litgpt.config import load_config, meta_model, with_adapters
from fabric_tp.measure import estimation
from fabric_tp.measure.estimation import estimate
from fabric_tp.measure.hardware import CARDS
from fabric_tp.measure.layers import FEW, with_few_layers
from fabric_tp.measure.schedule import schedule
from tests.models import litgpt_config

LAYERS = 9
WIDE = {"n_embd": 128, "head_size": 16, "intermediate_size": 192, "n_layer": LAYERS}
CASES: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "defaults": ("Llama-3-8B", (1, 2), {}),
    "FSDP2": ("Llama-3-8B", (2, 2), {"fused_loss": True}),
    "kept after the forward": ("Llama-3-8B", (4, 2), {"reshard_after_forward": False}),
    "full checkpointing": ("pythia-14m", (2, 2), {"activation_checkpointing": "full"}),
    "selective checkpointing": ("Llama-3-8B", (1, 4), {"activation_checkpointing": "selective"}),
    "whole sequences": ("phi-2", (1, 2), {"sequence_parallel": False}),
    "halves": ("Llama-3-8B", (1, 2), {"overlap": True}),
    "experts": ("Mixtral-8x7B-v0.1", (1, 2), {}),
}


@pytest.mark.swept(lambda p: p["case"] not in ("FSDP2", "selective checkpointing"))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("adapted", [False, True])
def test_is_what_all_blocks_need(case, adapted) -> None:
    name, (data, tensor), options = CASES[case]
    config = litgpt_config(name, **WIDE)
    if adapted:
        config = with_adapters(config, lora_r=4, lora_query=True, lora_mlp=True)
    sizes = {"data_parallel_size": data, "tensor_parallel_size": tensor, "micro_batch_size": 2}
    with mock.patch.object(estimation, "count_step", wraps=estimation.count_step) as few:
        found = estimate(config, fabric_tp.litgpt(**options), **sizes)
    assert [call.kwargs["missing"] for call in few.call_args_list] == [LAYERS - FEW, LAYERS - FEW - 1]
    with mock.patch.object(estimation, "with_few_layers", return_value=None):
        expected = estimate(config, fabric_tp.litgpt(**options), **sizes)
    assert Counter(found.collectives) == Counter(expected.collectives)
    times = [schedule(each.events, CARDS["h100"], {"data_parallel": tensor}) for each in (found, expected)]
    assert times[0].seconds == pytest.approx(times[1].seconds, rel=1e-3)
    assert times[0].flops == times[1].flops
    assert found.memory.phase == expected.memory.phase
    assert found.memory.peak == pytest.approx(expected.memory.peak, rel=1e-3)  # scalars of the clipping
    assert found.memory.at_peak == pytest.approx(expected.memory.at_peak, rel=1e-2, abs=100)
    assert found.memory.most == pytest.approx(expected.memory.most, rel=1e-2, abs=100)


@pytest.mark.parametrize("name", ["Gemma-3-1b-it", "Gemma-2-2b", "pythia-14m"])
def test_blocks_that_differ_are_all_counted(name) -> None:
    """Windows in some of them; and as a contrast one whose blocks are alike."""
    config = load_config(name)
    few = with_few_layers(config, meta_model(config).transformer.h)
    assert (few is None) == (name != "pythia-14m")
