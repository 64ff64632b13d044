"""A few training steps of models with dropout, on any mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import fabric_tp
from fabric_tp.styles.random_module import follow_run
from fabric_tp.testing import next_token_loss
from fabric_tp.testing.parity import _whole
from fabric_tp.testing.ranks import mesh
from tests.models import LENGTH, VOCABULARY
from tests.styles.table import SIZES

MESHES = [(1, 2), (1, 4), (2, 1), (2, 2)]
BATCH, STEPS = 8, 2


def follow(model: nn.Module) -> None:
    """Let the model's random modules know their place in a run, in which a forward has begun."""
    follow_run(model, mesh(1, 2), seed=7).begin(model, (torch.empty(SIZES["b"]),), {})


def samples(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def parallelized(build: Callable[[], nn.Module], options: dict[str, Any], sizes: tuple[int, int], seed: int = 7) -> Any:
    """Only the first rank's seed counts, and afterwards no rank's generator is like another's."""
    torch.manual_seed(seed + dist.get_rank())
    model = fabric_tp.auto(**options)(build(), mesh(*sizes)).train()
    torch.manual_seed(dist.get_rank() * 1000)
    return model


def train_step(model: nn.Module, step: int, sizes: tuple[int, int], micro_batches: int) -> dict[str, Tensor]:
    """Loss and gradients of a global batch of which each rank takes its samples."""
    rank = mesh(*sizes).get_local_rank("data_parallel")
    total = torch.zeros(())
    for number, tokens in enumerate(samples(step).chunk(micro_batches)):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(number == micro_batches - 1)
        mine = tokens[rank :: sizes[0]]
        loss = next_token_loss(model(mine), mine) / micro_batches
        loss.backward()
        total += loss.detach() / sizes[0]
    dist.all_reduce(total, group=mesh(*sizes).get_group("data_parallel"))
    return {"loss": total, **{name: grad.clone() for name, grad in _whole(model, lambda p: p.grad).items()}}


def train(
    build: Callable[[], nn.Module],
    options: dict[str, Any],
    sizes: tuple[int, int],
    micro_batches: int = 1,
    steps: int = STEPS,
    break_model: Callable[[nn.Module], None] | None = None,
) -> dict[str, Tensor]:
    model = parallelized(build, options, sizes)
    if break_model:
        break_model(model)
    result = {}
    for step in range(steps):
        result |= {
            f"{name} of step {step}": each for name, each in train_step(model, step, sizes, micro_batches).items()
        }
        model.zero_grad()
    return result


def worst(result: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert result.keys() == expected.keys()
    return max(
        float((each - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-30))
        for name, each in result.items()
    )
