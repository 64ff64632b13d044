"""Many steps: as many objects and bytes after the last as after the fifth."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

import fabric_tp
from fabric_tp.strategy.optimizer import local
from tests.fabric import as_under_torchrun
from tests.models import LENGTH, VOCABULARY, build
from tests.parallelize.test_parallelize import fabric_on_this_rank

STEPS, WARM_UP, BATCH = 15, 5, 2


def train(
    sizes: tuple[int, int], options: dict[str, Any], accumulate: int, clip: bool, leak: str = ""
) -> tuple[Counter, Counter]:
    """What is alive after ``WARM_UP`` steps and after all."""
    kept: list[Any] = [None] * STEPS
    leaks: dict[str, Callable[[Tensor], Any]] = {
        "": lambda loss: None,
        "loss": lambda loss: loss,
        "tensor of a number": lambda loss: loss.detach().clone(),
        "object": lambda loss: [[]],
    }
    with as_under_torchrun():
        fabric = fabric_on_this_rank(sizes, fabric_tp.litgpt(**options), None)
        model = fabric.setup(build("Llama-3-8B"))
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3))
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        for step in range(STEPS):
            for micro_batch in range(accumulate):
                with fabric.no_backward_sync(model, enabled=micro_batch < accumulate - 1):
                    loss = fabric_tp.cross_entropy(model(inputs), targets)
                    fabric.backward(loss / accumulate)
            if clip:
                fabric.clip_gradients(model, optimizer, max_norm=0.5)
            with local(optimizer):
                optimizer.step()
            optimizer.zero_grad()
            kept[step] = leaks[leak](loss)
            del loss
            if step == WARM_UP - 1:
                early = alive()  # the first call makes Python objects for the storages, and the result is one
                early = alive()
        return early, alive()


def alive() -> Counter:
    gc.collect()
    objects = gc.get_objects()
    counts = Counter({"objects": len(objects)})
    storages: dict[int, int] = {}
    for each in objects:
        # Neither isinstance, which runs code of proxies, nor tensors without memory: caches of DTensor, earlier tests'.
        if issubclass(type(each), Tensor):
            counts[type(each).__name__] += 1
            has_storage = not issubclass(type(each), DTensor | FakeTensor) and each.layout == torch.strided
            if has_storage and each.device.type == "cpu":
                storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    counts["bytes"] = sum(storages.values())
    return counts


@pytest.mark.swept(lambda p: (p["sizes"], p["activation_checkpointing"]) != ((1, 2), "none"))
@pytest.mark.parametrize(
    ("sizes", "activation_checkpointing", "accumulate"),
    [
        *(((1, 2), "none", 1), ((1, 2), "full", 3), ((1, 2), "selective", 3)),
        *(((2, 1), "none", 3), ((2, 1), "full", 1)),
    ],
    ids=str,
)
def test_as_much_is_alive_after_many_steps_as_after_five(pool, sizes, activation_checkpointing, accumulate) -> None:
    """With micro-batches and clipping, and without either."""
    options = {"activation_checkpointing": activation_checkpointing}
    early, late = pool(2)(train, sizes, options, accumulate, accumulate > 1)
    more = late - early
    assert more.pop("objects", 0) < STEPS - WARM_UP  # caches of others may grow now and then
    assert not more


@pytest.mark.swept(lambda p: p["leak"] != "object")
@pytest.mark.parametrize(("leak", "kind"), [("loss", "Tensor"), ("tensor of a number", "bytes"), ("object", "objects")])
def test_a_leak_would_be_noticed(pool, leak, kind) -> None:
    early, late = pool(2)(train, (1, 2), {}, 1, True, leak)
    assert late[kind] >= early[kind] + STEPS - WARM_UP
