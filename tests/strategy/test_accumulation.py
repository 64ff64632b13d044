"""Micro-batches and ranks add up to the global batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fabric_tp
from tests.fabric import batch, on_ranks
from tests.models import build
from tests.strategy.training import gradients, step_loss


def gradient_after_not_skipping(ours: bool) -> float:
    """How far ranks of a data-parallel group are apart after a backward that follows ``enabled=False``."""
    with on_ranks((2, 1), ours) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        with fabric.no_backward_sync(model, enabled=False):
            fabric.backward(step_loss(fabric, model))
        model.zero_grad()
        fabric.backward(step_loss(fabric, model))
        try:
            found = gradients(model)
        except RuntimeError:
            return 1.0
        return float(len(found) < len(list(model.parameters())))


def test_synchronisation_is_restored(pool) -> None:
    assert pool(2)(gradient_after_not_skipping, False) > 0
    assert pool(2)(gradient_after_not_skipping, True) == 0


def nested_synchronisation() -> list[bool]:
    with on_ranks((1, 1)) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        control = fabric.strategy._backward_sync_control._synchronises
        inner = model._forward_module
        states = []
        with fabric.no_backward_sync(model):
            with fabric.no_backward_sync(model, enabled=False):
                states.append(control[inner])
            states.append(control[inner])
        return [*states, control[inner]]


def test_synchronisation_nests(pool) -> None:
    assert pool(1)(nested_synchronisation) == [True, False, True]


def accumulated(sizes: tuple[int, int], micro_batches: int) -> dict[str, Tensor]:
    """Gradients of 8 samples, summed."""
    with on_ranks(sizes, parallelize_fn=fabric_tp.llama()) as fabric:
        model = fabric.setup(build("llama", torch.float64))  # litgpt's RMSNorm would compute in fp32
        inputs, targets = batch(fabric, 8)
        for i, (x, y) in enumerate(zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True)):
            with fabric.no_backward_sync(model, enabled=i < micro_batches - 1):
                fabric.backward(fabric_tp.cross_entropy(model(x), y, reduction="sum"))
        return gradients(model)


@pytest.mark.swept(lambda p: p["sizes"] != (1, 2))
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 2)])
def test_micro_batches_add_up_to_the_batch(pool, sizes) -> None:
    ranks = pool(sizes[0] * sizes[1])
    whole, parts = ranks(accumulated, sizes, 1), ranks(accumulated, sizes, 4 // sizes[0])
    for name, gradient in whole.items():
        assert torch.allclose(parts[name], gradient, rtol=1e-9, atol=1e-11), name


def accumulated_twice(sizes: tuple[int, int], at_once: bool) -> bool:
    """The same micro-batch twice is bitwise twice the gradient, since doubling does not round."""
    with on_ranks(sizes) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        inputs, targets = batch(fabric, 4)
        for i in range(1 if at_once else 2):
            with fabric.no_backward_sync(model, enabled=not at_once and i == 0):
                loss = fabric_tp.cross_entropy(model(inputs), targets)
                fabric.backward(loss * 2 if at_once else loss)
        result = gradients(model)
        return result  # type: ignore[return-value]


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)])
def test_accumulation_is_bitwise_where_sums_allow(pool, sizes) -> None:
    ranks = pool(sizes[0] * sizes[1])
    twice, doubled = ranks(accumulated_twice, sizes, False), ranks(accumulated_twice, sizes, True)
    assert all(torch.equal(twice[name], gradient) for name, gradient in doubled.items())


def mean_over_targets(sizes: tuple[int, int], ours: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss of two micro-batches whose ranks ignore different numbers of targets, and its gradients."""
    with on_ranks(sizes, parallelize_fn=fabric_tp.llama()) as fabric:
        model = fabric.setup(build("llama", torch.float64))
        inputs, targets = batch(fabric, 8)
        wanted = torch.rand(8, targets.shape[1], generator=torch.Generator().manual_seed(5)) ** 4
        rank, size = fabric.strategy.device_mesh.get_local_rank("data_parallel"), sizes[0]  # type: ignore[attr-defined]
        targets = targets.masked_fill(wanted.chunk(size)[rank] < 0.3, -100)
        micro = list(zip(inputs.chunk(2), targets.chunk(2), strict=True))
        count = fabric_tp.count_targets([y for _, y in micro], fabric.strategy.device_mesh)  # type: ignore[attr-defined]
        total = torch.zeros(())
        for i, (x, y) in enumerate(micro):
            with fabric.no_backward_sync(model, enabled=i == 0):
                if ours:
                    loss = fabric_tp.cross_entropy(model(x), y, reduction="sum") / count
                else:
                    loss = fabric_tp.cross_entropy(model(x), y) / 2
                fabric.backward(loss)
            total = total + loss.detach()
        return float(fabric.all_reduce(total)), gradients(model)


def test_every_target_of_the_global_batch_weighs_the_same(pool) -> None:
    loss, expected = pool(1)(mean_over_targets, (1, 1), True)
    for sizes in [(2, 1), (2, 2)]:
        found, grads = pool(sizes[0] * sizes[1])(mean_over_targets, sizes, True)
        assert found == pytest.approx(loss, rel=1e-9)
        assert all(torch.allclose(grads[name], g, rtol=1e-6, atol=1e-9) for name, g in expected.items())
    means, _ = pool(2)(mean_over_targets, (2, 1), False)
    assert means != pytest.approx(loss, rel=1e-3)
