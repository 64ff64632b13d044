"""What activation checkpointing computes again has the same masks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fabric_tp.testing.parity import TOLERANCE
from tests.styles.dropout_models import MODELS, everywhere
from tests.styles.dropout_runs import STEPS, parallelized, train, train_step, worst


@pytest.mark.swept(lambda p: p["sizes"] != (1, 2))
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("model", ["everywhere", "adapters"])
def test_activation_checkpointing(pool, one_device, model, kind, sizes) -> None:
    options = {"activation_checkpointing": kind}
    result = pool(sizes[0] * sizes[1])(train, MODELS[model], options, sizes, micro_batches=2)
    assert worst(result, one_device(MODELS[model])) < TOLERANCE


@pytest.mark.parametrize("checkpointed", ["yes", "reentrant"])
def test_checkpointing_in_the_model(pool, one_device, checkpointed) -> None:
    result = pool(2)(train, partial(everywhere, checkpointed), {}, (1, 2), micro_batches=2)
    assert worst(result, one_device(everywhere)) < TOLERANCE


def checkpoints_without_random_state() -> None:
    with pytest.raises(ValueError, match="preserve_rng_state=False, which must be True"):
        train(partial(everywhere, "wrongly"), {}, (1, 1))


def test_checkpointing_without_random_state_is_refused(pool) -> None:
    pool(1)(checkpoints_without_random_state)


def train_with_reseeding() -> dict[str, Tensor]:
    """Somebody sets torch's generator to the same state before each forward."""
    model = parallelized(everywhere, {"activation_checkpointing": "full"}, (1, 1))
    model.register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)
    result = {}
    for step in range(STEPS):
        result |= {f"{name} of step {step}": each for name, each in train_step(model, step, (1, 1), 4).items()}
        model.zero_grad()
    return result


def test_reseeding_changes_nothing(pool, one_device) -> None:
    assert worst(pool(1)(train_with_reseeding), one_device(everywhere)) < TOLERANCE
