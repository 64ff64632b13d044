from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import fabric_tp
from benchmarks import communication
from benchmarks.llama import Llama, Shape
from benchmarks.memory_scaling import LEAN, PUBLISHED, count_peer, feed_forward_step, shape_of
from benchmarks.plot import markdown, plot_feed_forward, plot_llama
from fabric_tp.architectures.litgpt.config import load_config
from fabric_tp.measure.estimation import estimate
from fabric_tp.measure.step import default_dtype
from fabric_tp.mesh import fake_mesh, fake_tensors
from fabric_tp.testing.ranks import mesh

SMALL = Shape(layers=2, width=128, heads=8, kv_heads=4, hidden=192, vocabulary=512, length=64)


def real_peer(sizes: tuple[int, int]) -> tuple[int, int]:
    step = count_peer(Llama(SMALL), SMALL, mesh(*sizes))
    return step.memory.peak, step.sent("tensor_parallel")


@pytest.mark.swept(lambda p: p["sizes"] == (2, 2))
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)])
def test_torch_styles_are_predicted_as_they_are(pool, sizes) -> None:
    peak, sent = pool(sizes[0] * sizes[1])(real_peer, sizes)
    with fake_mesh(*sizes) as pretended, fake_tensors():
        step = count_peer(Llama(SMALL), SMALL, pretended)
    assert step.memory.peak == pytest.approx(peak, rel=0.03)
    # torch reduces the gradient norm over both dimensions of a mesh at once, if somebody has flattened it before
    assert step.sent("tensor_parallel") == pytest.approx(sent, rel=1e-3)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_feed_forward_takes_less_than_what_was_published(size) -> None:
    """Of 16 bytes a parameter (fp32, AdamW) and nothing else but the batch; the published needs about 20 at least."""
    width = 512
    with fake_mesh(1, size) as pretended, fake_tensors():
        peak = feed_forward_step(pretended, width, batch=1).memory.peak
    parameters = 3 * width**2
    assert peak <= 1.03 * 16 * parameters / size
    assert peak / parameters < PUBLISHED[size] * 1e9 / (3 * 8192**2)


def test_a_step_takes_half_of_what_torch_styles_take() -> None:
    """Llama-3-8B at 8192 tokens on 8 ranks, with fewer layers."""
    config = load_config("Llama-3-8B")
    config.n_layer = 4
    ours = estimate(config, fabric_tp.litgpt(**LEAN), tensor_parallel_size=8)
    shape = replace(shape_of("Llama-3-8B", 8192), layers=4)
    with fake_mesh(1, 8) as pretended, fake_tensors():
        with default_dtype(torch.bfloat16):
            model = Llama(shape)
        peer = count_peer(model, shape, pretended)
    assert ours.memory.peak <= 0.5 * peer.memory.peak


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_collectives_are_the_least_and_what_is_gathered_again(sequence_parallel) -> None:
    config = load_config("Llama-3-8B")
    config.n_layer, length = 3, 256
    parallelize = fabric_tp.litgpt(sequence_parallel=sequence_parallel)
    step = estimate(config, parallelize, tensor_parallel_size=2, sequence_length=length)
    large, small = communication.split(step.collectives, 2 * length * config.n_embd)
    expected = communication.least(config.n_layer, sequence_parallel)
    expected["all-gather"] += 2 * config.n_layer + 1 if sequence_parallel and parallelize.regather else 0
    assert Counter(each.kind for each in large) == Counter(expected)
    assert len(small) == 3 + sequence_parallel  # two of the loss, the norm of the gradients, partial gradients


def test_markdown() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --: | --: |\n| 1 | 2 |\n"


def test_plots(tmp_path) -> None:
    with fake_mesh(1, 1) as pretended, fake_tensors():
        memory = feed_forward_step(pretended, 64, batch=1).memory
    plot_feed_forward({1: memory}, PUBLISHED, tmp_path / "one.png")
    plot_llama("name", {(1, 1): {"ours": memory, "theirs": memory}}, tmp_path / "two.png")
    assert (tmp_path / "one.png").stat().st_size > 0
    assert (tmp_path / "two.png").stat().st_size > 0
