"""The masks of dropout: bitwise the same on every mesh, and different for everything else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_tp.testing.ranks import mesh
from tests.models import LENGTH
from tests.styles.dropout_models import RATE, everywhere
from tests.styles.dropout_runs import BATCH, MESHES, STEPS, parallelized, samples

CORE = [((1, 1), True, 2), ((1, 2), True, 1), ((1, 2), False, 2), ((2, 1), True, 1), ((2, 2), True, 2)]
"""Meshes, sequence parallelism and micro-batches that each differ from others in something."""


def whole_masks(
    sizes: tuple[int, int],
    options: dict[str, Any],
    micro_batches: int = 1,
    seed: int = 7,
    break_model: Callable[[nn.Module], None] | None = None,
) -> dict[str, Tensor]:
    """What each call of each dropout drops, gathered from all ranks, sample by sample."""
    model = parallelized(everywhere, options, sizes, seed)
    if break_model:
        break_model(model)
    calls: dict[str, list[Tensor]] = {}

    def remember(name: str, module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        style = module.parallelized.style
        zeros = (y == 0).to(torch.uint8)
        dim = style.shard_dim(zeros) if sizes[1] > 1 else None
        calls.setdefault(name, []).append(_gathered(zeros, sizes, dim))

    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(partial(remember, name))
    rank = mesh(*sizes).get_local_rank("data_parallel")
    with torch.no_grad():
        for step in range(STEPS):
            for tokens in samples(step).chunk(micro_batches):
                model(tokens[rank :: sizes[0]])
    twice = {name: 2 if name.endswith("both") else 1 for name in calls}
    return {
        f"{name}, call {call}": torch.cat(masks[call :: twice[name]])
        for name, masks in calls.items()
        for call in range(twice[name])
    }


def _gathered(mask: Tensor, sizes: tuple[int, int], dim: int | None) -> Tensor:
    parts = [torch.empty_like(mask, memory_format=torch.contiguous_format) for _ in range(sizes[1])]
    dist.all_gather(parts, mask.contiguous(), group=mesh(*sizes).get_group("tensor_parallel"))
    if dim is None:
        assert all(torch.equal(part, parts[0]) for part in parts)
    whole = parts[0] if dim is None else torch.cat(parts, dim)
    replicas = [torch.empty_like(whole) for _ in range(sizes[0])]
    dist.all_gather(replicas, whole, group=mesh(*sizes).get_group("data_parallel"))
    return torch.stack(replicas, 1).flatten(0, 1)


@pytest.mark.swept(lambda p: (p["sizes"], p["sequence_parallel"], p["micro_batches"]) not in CORE)
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1), *MESHES], ids=str)
def test_masks_are_bitwise_the_same(pool, sizes, sequence_parallel, micro_batches) -> None:
    expected = pool(1)(whole_masks, (1, 1), {})
    masks = pool(sizes[0] * sizes[1])(whole_masks, sizes, {"sequence_parallel": sequence_parallel}, micro_batches)
    assert len(masks) == 1 + 2 * 6
    assert masks.keys() == expected.keys()
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name]), name


def test_masks_differ_between_modules_calls_steps_and_samples(pool) -> None:
    masks = pool(1)(whole_masks, (1, 1), {})
    wide = [mask for name, mask in masks.items() if mask.shape == (STEPS * BATCH, LENGTH, 64)]
    rows = torch.cat(wide).flatten(1)
    assert len(rows) == 9 * STEPS * BATCH
    centred = (rows.double() - RATE) / (RATE * (1 - RATE)) ** 0.5
    correlations = centred @ centred.T / rows.shape[1] ** 0.5
    correlations.fill_diagonal_(0)
    assert float(correlations.abs().max()) < 6


def test_masks_differ_between_seeds(pool) -> None:
    one, other = (pool(1)(whole_masks, (1, 1), {}, seed=seed) for seed in (7, 8))
    assert not any(torch.equal(mask, other[name]) for name, mask in one.items())


def assert_evaluation_leaves_no_trace() -> None:
    model = parallelized(everywhere, {}, (1, 2))
    position = model.embedding_dropout.position
    model.eval()
    before = torch.get_rng_state()
    first, second = model(samples(0)), model(samples(0))
    assert torch.equal(first.to_local(), second.to_local())
    assert torch.equal(torch.get_rng_state(), before)
    assert position.samples == 0


def test_evaluation_drops_nothing(pool) -> None:
    pool(2)(assert_evaluation_leaves_no_trace)
