"""Random states in checkpoints: a run continues as if it had not been interrupted, on any mesh."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_tp.random import get_state, set_state
from fabric_tp.testing.parity import TOLERANCE
from tests.styles.dropout_models import everywhere
from tests.styles.dropout_runs import parallelized, train_step, worst

STEPS = 4


def run(sizes: tuple[int, int], first: int, file: Path, seed: int = 7) -> list[dict[str, Tensor]]:
    """Losses and gradients of the steps from ``first`` on, all of them from the same weights."""
    model = parallelized(everywhere, {"activation_checkpointing": "full"}, sizes, seed)
    if first:
        set_state(model, torch.load(file, weights_only=True))
    result = []
    for step in range(first, STEPS):
        result.append(train_step(model, step, sizes, micro_batches=2))
        model.zero_grad()
        if step == 1 and not first and dist.get_rank() == 0:
            torch.save(get_state(model), file)
    return result


@pytest.mark.swept(lambda p: p["sizes"] != (1, 2))
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
def test_dropout_continues_on_any_mesh(pool, tmp_path, sizes) -> None:
    expected = pool(2)(run, (1, 2), 0, tmp_path / "state.pt")
    continued = pool(sizes[0] * sizes[1])(run, sizes, 2, tmp_path / "state.pt", seed=8)
    assert len(continued) == 2
    for step, after in zip(expected[2:], continued, strict=True):
        assert worst(after, step) < TOLERANCE
    assert worst(expected[0], expected[2]) > 10 * TOLERANCE


def draws() -> list[float]:
    return [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()]  # noqa: NPY002


def test_generators_continue(tmp_path) -> None:
    model = nn.Linear(2, 2)
    np.random.randn()  # noqa: NPY002  # NumPy keeps the second of two normal numbers
    torch.save(get_state(model), tmp_path / "state.pt")
    expected = [draws() for _ in range(3)]
    assert [draws() for _ in range(3)] != expected
    set_state(model, torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draws() for _ in range(3)] == expected


def test_asking_changes_nothing() -> None:
    model = nn.Linear(2, 2)
    set_state(model, get_state(model))
    state = get_state(model)
    get_state(model)
    expected = draws()
    set_state(model, state)
    assert draws() == expected


def position_after_a_state_without_dropout() -> Any:
    model = parallelized(everywhere, {}, (1, 1))
    train_step(model, 0, (1, 1), micro_batches=1)
    set_state(model, get_state(nn.Linear(2, 2)))
    return get_state(model)["dropout"]


def test_state_of_a_model_without_dropout(pool) -> None:
    """A run may go on with dropout where it had none."""
    assert pool(1)(position_after_a_state_without_dropout)["samples"] == 8


def samples_seen(sizes: tuple[int, int]) -> Any:
    model = parallelized(everywhere, {}, sizes)
    for step in range(3):
        train_step(model, step, sizes, micro_batches=1)
    return get_state(model)["dropout"]


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1)], ids=str)
def test_position_counts_samples_of_all_ranks(pool, sizes) -> None:
    assert pool(sizes[0] * sizes[1])(samples_seen, sizes) == {"seed": 7, "samples": 3 * 8}
