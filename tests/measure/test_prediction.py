"""Times of whole steps: what must be so on any hardware."""

from __future__ import annotations

from dataclasses import replace

import pytest

import fabric_tp
from fabric_tp.architectures.litgpt.config import load_config, meta_model
from fabric_tp.architectures.litgpt.flops import model_flops
from fabric_tp.measure import CARDS, Link, estimate, predict
from fabric_tp.measure.planning import fastest, plan
from tests.models import litgpt_config

CONFIG = litgpt_config("Llama-3-8B", n_embd=256, head_size=32, intermediate_size=512, n_layer=9, block_size=512)
SIZES = {"tensor_parallel_size": 4, "data_parallel_size": 2, "micro_batch_size": 2}
SLOW = replace(CARDS["h100"], inside=Link(3e11, 1.0, 0.0), kernel=0.0, collective=0.0)
"""With a link on which communication takes more than a quarter of the time."""


def predicted(hardware=SLOW, **options):
    return predict(estimate(CONFIG, fabric_tp.litgpt(**options), **SIZES), hardware)


def test_overlap_hides_most_of_what_was_exposed() -> None:
    plain, overlapped = predicted().time, predicted(overlap=True).time
    axis = "tensor_parallel"
    exposed, hidden = plain.exposed[axis], plain.hidden[axis]
    assert exposed > 0.25 * plain.seconds
    assert overlapped.exposed[axis] < 0.6 * exposed
    assert overlapped.exposed[axis] + overlapped.hidden[axis] == pytest.approx(exposed + hidden, rel=1e-2)


def test_gathering_again_is_hidden_and_checkpointing_costs_products() -> None:
    plain, kept = predicted().time, predicted(regather=False).time
    assert plain.hidden["tensor_parallel"] > kept.hidden["tensor_parallel"]
    checkpointed = predicted(activation_checkpointing="full").time
    assert checkpointed.computing["products"] == pytest.approx(4 / 3 * plain.computing["products"], rel=0.05)
    assert predicted(compile=True).seconds < plain.seconds


def test_the_share_of_the_peak_is_that_of_six_operations_a_weight() -> None:
    found = predicted()
    model = meta_model(CONFIG)
    weights = sum(each.numel() for name, each in model.named_parameters() if each.dim() > 1 and "wte" not in name)
    per_token = 6 * weights + 12 * 9 * CONFIG.n_head * CONFIG.head_size * CONFIG.block_size
    rate = found.tokens_per_second * per_token
    assert found.share_of_peak == pytest.approx(rate / 989e12)
    assert found.tokens_per_second * 8 * found.seconds == pytest.approx(found.estimate.tokens)


def test_of_experts_those_that_a_token_visits_count() -> None:
    found = model_flops(meta_model(load_config("Mixtral-8x7B-v0.1")), 1, 1)
    assert found / 6 == pytest.approx(12.8e9, rel=0.02)  # active parameters of 46.7e9


def test_a_plan_tries_meshes_and_micro_batches() -> None:
    found = fastest(plan(CONFIG, devices=4, hardware="h100", micro_batch_sizes=(1, 2)))
    ways = {
        (e.tensor_parallel_size, e.data_parallel_size, e.micro_batch_size, e.parallelize.overlap)
        for e in (each.estimate for each in found)
    }
    assert ways == {
        *((t, 4 // t, size, False) for t in (1, 2, 4) for size in (1, 2)),
        *((t, 4 // t, 2, True) for t in (2, 4)),
    }
    rates = [each.tokens_per_second for each in found]
    assert rates == sorted(rates, reverse=True)
    assert found[0].estimate.tensor_parallel_size == 1  # a small model needs no tensor parallelism
    nothing = plan(CONFIG, devices=4, hardware=replace(CARDS["h100"], memory=10**6), micro_batch_sizes=(1,))
    assert list(nothing) == []


def test_it_can_be_read() -> None:
    text = str(predicted())
    for part in ("waiting, tensor parallel", "products", "tokens per second and device", "share of peak (MFU)", "█"):
        assert part in text
