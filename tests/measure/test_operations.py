"""What a step computes is counted as torch counts it, and fused operations move less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from fabric_tp.measure.communication import Collective, CollectiveCounter
from fabric_tp.measure.memory import MemoryTracker
from fabric_tp.measure.operations import Event, Issue, Operation, OperationRecorder, Wait, extended
from fabric_tp.mesh import fake_mesh, fake_tensors
from tests.models import VOCABULARY, litgpt_config

N = 256
BYTES = 4 * N


def recorded(run, phase: str = "forward") -> list[Event]:
    with CollectiveCounter() as counter, MemoryTracker() as tracker:
        counter.phase = phase
        with OperationRecorder(counter, tracker) as recorder:
            kept = run()
        recorder.finish()
        del kept
    return recorder.events


def operations(events: list[Event]) -> list[Operation]:
    return [event for event in events if isinstance(event, Operation)]


def test_products_are_those_that_torch_counts() -> None:
    from litgpt import GPT

    model = GPT(litgpt_config("Llama-3-8B", n_layer=2))
    tokens = torch.randint(VOCABULARY, (2, 16))

    def step() -> None:
        model(tokens).square().mean().backward()

    found = operations(recorded(step))
    with FlopCounterMode(display=False) as counter:
        step()
    assert sum(each.flops for each in found if each.work == "products") == counter.get_total_flops()
    assert all(each.flops == each.executed for each in found if each.work == "products")


@pytest.mark.parametrize("causal", [False, True])
def test_causal_attention_computes_half_of_what_is_counted(causal) -> None:
    b, heads, groups, s, d = 2, 4, 2, 16, 8
    q = torch.randn(b, heads, s, d, requires_grad=True)
    k, v = (torch.randn(b, groups, s, d, requires_grad=True) for _ in range(2))

    def step() -> Tensor:
        y = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        y.sum().backward()
        return y

    forward, backward = (each for each in operations(recorded(step)) if each.work == "attention")
    product = 2 * b * heads * s * s * d
    assert (forward.flops, backward.flops) == (2 * product, 5 * product)
    for each in (forward, backward):
        assert each.executed == (each.flops // 2 if causal else each.flops)


def test_bytes_are_those_that_are_read_and_written() -> None:
    a, b, table, index = torch.randn(N), torch.randn(N), torch.randn(100, N), torch.tensor([3])

    def run() -> list[Tensor]:
        c = a + b
        c.mul_(2)
        return [c.view(2, -1), nn.functional.embedding(index, table), torch.empty(N), b.copy_(a), a[:64] + b[:64]]

    found = [each.nbytes for each in operations(recorded(run))]
    assert found == [3 * BYTES, 2 * BYTES, 2 * BYTES + 8, 2 * BYTES, 3 * 4 * 64]


@pytest.mark.parametrize("phase", ["forward", "optimizer"])
def test_fused_operations_read_once_and_write_what_is_needed_later(phase) -> None:
    a, weight = torch.randn(N), torch.randn(N, N)

    def run() -> Tensor:
        b = a * 2  # reads a
        c = b + a
        kept = c.relu()  # is written: read by the product and by what follows
        return (weight @ kept[:, None])[:, 0] + kept

    found = operations(recorded(run, phase))
    assert [each.work for each in found] == [*["other operations"] * 3, "products", "other operations"]
    if phase != "forward":  # only blocks are compiled
        assert [each.fused for each in found] == [each.nbytes for each in found]
        return
    assert [each.fused for each in found[:3]] == [BYTES, 0, BYTES]
    assert [each.starts_kernel for each in found] == [True, False, False, True, True]


def test_collectives_are_between_what_is_computed() -> None:
    with fake_mesh(1, 2) as mesh, fake_tensors(), CollectiveCounter(mesh) as counter, MemoryTracker() as tracker:
        name = mesh["tensor_parallel"].get_group().group_name
        x = torch.zeros(N)
        with OperationRecorder(counter, tracker) as recorder:
            started = torch.ops._c10d_functional.all_gather_into_tensor(x, 2, name)
            y = x + 1
            y += torch.ops._c10d_functional.wait_tensor(started)[:N]
    issue, first, wait, last = recorder.events
    assert isinstance(issue, Issue)
    assert isinstance(first, Operation)
    assert isinstance(last, Operation)
    assert wait == Wait(issue.number)
    assert issue.collective == Collective("all-gather", "tensor_parallel", 2, 2 * BYTES, "")


def operation(nbytes: int, phase: str = "clipping") -> Operation:
    return Operation("other operations", phase, torch.float32, 0, 0, nbytes, nbytes, True)


def test_what_more_blocks_do_elsewhere_is_extended() -> None:
    few = [operation(10, "forward"), operation(20), operation(4, "optimizer")]
    more = [operation(11, "forward"), operation(20), operation(20), operation(6, "optimizer")]
    assert extended(few, more, 3) == (
        operation(13, "forward"),
        *[operation(20)] * 4,
        operation(10, "optimizer"),
    )
    with pytest.raises(ValueError):
        extended(few, [operation(1, "backward"), *more], 3)
