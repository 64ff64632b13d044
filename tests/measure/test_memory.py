"""The tracker counts each byte once, from the operation that made it until the last tensor on it is gone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from fabric_tp import _torch
from fabric_tp.measure.memory import MemoryTracker
from fabric_tp.testing.ranks import mesh

KB = 1024


def kilobyte(count: int = 1) -> Tensor:
    return torch.zeros(count * KB // 4)


def test_peak_is_what_lived_at_once() -> None:
    with MemoryTracker() as tracker:
        a = kilobyte(3)
        b = kilobyte(2)
        del a
        c = kilobyte(4)
    memory = tracker.memory()
    assert memory.peak == 6 * KB
    assert memory.at_peak["temporaries"] == 6 * KB
    del b, c


def test_views_share_what_they_are_views_of() -> None:
    with MemoryTracker() as tracker:
        a = kilobyte(2)
        part = a.view(2, -1)[0]
        del a
        b = kilobyte()  # the part keeps both kilobytes
    assert tracker.memory().peak == 3 * KB
    del part, b


def test_an_operation_in_place_makes_nothing() -> None:
    with MemoryTracker() as tracker:
        kilobyte().add_(1).mul_(2)
    assert tracker.memory().peak == KB


def test_freed_tensors_are_gone() -> None:
    with MemoryTracker() as tracker:
        for _ in range(5):
            kilobyte()
        tracker.restart()
    assert tracker.memory().peak == 0


def test_a_storage_that_is_resized_by_an_operation() -> None:
    with MemoryTracker() as tracker:
        a = kilobyte()
        a.resize_(4 * a.numel())
    assert tracker.memory().peak == 4 * KB


def test_older_tensors_count_once_they_are_marked() -> None:
    old = kilobyte(3)
    with MemoryTracker() as tracker:
        assert tracker.memory().peak == 0
        tracker.mark("parameters", [old, old[: KB // 8], None])
    assert tracker.memory().at_peak["parameters"] == 3 * KB


def test_a_kind_holds_from_the_beginning() -> None:
    """A gradient is one from when it is made, though only the end of the backward tells."""
    with MemoryTracker() as tracker:
        a = kilobyte()
        b = kilobyte(2)
        del b
        tracker.mark("gradients", [a])
    memory = tracker.memory()
    assert memory.at_peak["gradients"] == KB
    assert memory.at_peak["temporaries"] == 2 * KB


def test_what_lives_is_marked_together_and_what_was_marked_is_left() -> None:
    with MemoryTracker() as tracker:
        tracker.mark("parameters", [a := kilobyte()])
        b = kilobyte(2)
        tracker.mark_live("activations")
        c = kilobyte(3)
    memory = tracker.memory()
    assert (memory.at_peak["parameters"], memory.at_peak["activations"]) == (KB, 2 * KB)
    assert memory.at_peak["temporaries"] == 3 * KB
    del a, b, c


def test_the_phase_of_the_peak() -> None:
    with MemoryTracker() as tracker:
        tracker.phase("small")
        kilobyte()
        tracker.phase("large")
        kilobyte(2)
        tracker.phase("end")
        kilobyte()
    assert tracker.memory().phase == "large"


def test_most_of_a_kind_may_be_elsewhere_than_the_peak() -> None:
    with MemoryTracker() as tracker:
        tracker.made = "logits and loss"
        kilobyte(2)
        tracker.made = "temporaries"
        kilobyte(3)
    memory = tracker.memory()
    assert memory.at_peak["logits and loss"] == 0
    assert memory.most["logits and loss"] == 2 * KB


def test_what_autograd_keeps_is_counted() -> None:
    weight = torch.ones(KB // 4, requires_grad=True)
    with MemoryTracker() as tracker:
        y = weight.exp().exp().exp()  # each keeps its result
        tracker.restart()
        y.sum().backward()
        del y
    assert 3 * KB < tracker.memory().peak <= 6 * KB


def test_fake_tensors_count_like_real_ones() -> None:
    def peak() -> int:
        with MemoryTracker() as tracker:
            model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
            model(torch.ones(32, 64)).sum().backward()
        return tracker.memory().peak

    real = peak()
    with _torch.FakeTensorMode():
        assert peak() == real


def test_fake_tensors_among_real_ones_take_nothing() -> None:
    """DTensor finds out shapes by them."""
    with MemoryTracker() as tracker, _torch.FakeTensorMode():
        kilobyte()
    assert tracker.memory().peak == 0


def local_bytes() -> int:
    with MemoryTracker() as tracker:
        whole = DTensor.from_local(kilobyte(), mesh(1, 2)["tensor_parallel"], [Shard(0)], run_check=False)
        tracker.restart()
        whole = whole.exp()
    return tracker.memory().peak


def test_a_dtensor_takes_what_its_shard_takes(pool) -> None:
    assert 2 * KB <= pool(2)(local_bytes) < 2 * KB + 64


def gathered_bytes() -> tuple[int, int]:
    """While two layers of 4 KiB run one after the other: without, and with freeing the gathered parameters."""
    peaks = []
    for reshard_after_forward in (False, True):
        model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(3)])
        for layer in model:
            fully_shard(layer, mesh=mesh(2, 1)["data_parallel"], reshard_after_forward=reshard_after_forward)
        fully_shard(model, mesh=mesh(2, 1)["data_parallel"])
        with MemoryTracker() as tracker, torch.no_grad():
            model(torch.ones(1, 32))
        peaks.append(tracker.memory().most["collective buffers"])
    return peaks[0], peaks[1]


def test_what_fsdp_frees_is_gone(pool) -> None:
    kept, freed = pool(2)(gathered_bytes)
    assert kept >= freed + 4 * KB


def test_counts_what_the_allocator_counts() -> None:
    """torch's profiler sees each allocation of the CPU; a matrix product and GELU take nothing aside."""
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
    x = torch.ones(256, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        model(x).square().sum().backward()
    events = sorted(
        (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    assert events
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    model.zero_grad()
    with MemoryTracker() as tracker:
        tracker.mark("parameters", model.parameters())
        model(x).square().sum().backward()
    memory = tracker.memory()
    assert memory.peak - memory.at_peak["parameters"] == pytest.approx(peak, rel=0.01)
