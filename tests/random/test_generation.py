"""Samples from a model depend on their seed alone, and leave the run that they interrupt alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fabric_tp
from fabric_tp.random import get_state
from tests.models import VOCABULARY
from tests.styles.dropout_models import everywhere
from tests.styles.dropout_runs import parallelized, samples

MESHES = [(1, 2), (2, 1), (1, 4), (2, 2)]


def generate(sizes: tuple[int, int], drift: int) -> list[int]:
    """From a model with dropout, in training, on ranks that have drawn differently often."""
    model = parallelized(everywhere, {}, sizes)
    model(samples(0)[:4])
    torch.rand(dist.get_rank() + drift)
    before = get_state(model)
    prompt = torch.arange(7) % VOCABULARY
    generated = fabric_tp.generate(model, prompt, 9, seed=5, top_k=20)
    after = get_state(model)
    assert after["dropout"] == before["dropout"]
    assert after["python"] == before["python"]
    assert torch.equal(after["numpy"]["key"], before["numpy"]["key"])
    assert torch.equal(after["torch"], before["torch"])
    return generated.tolist()


@pytest.mark.swept(lambda p: p["sizes"] != (2, 2))
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_same_on_every_mesh_and_from_every_state(pool, sizes) -> None:
    assert pool(sizes[0] * sizes[1])(generate, sizes, drift=3) == pool(1)(generate, (1, 1), drift=0)
