"""Links between devices, and hardware by name, by file and as measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fabric_tp.measure import CARDS, Hardware, Link, load_hardware
from fabric_tp.measure.calibration import measure_hardware, measure_rank, with_bandwidth
from fabric_tp.measure.communication import Collective

H100 = CARDS["h100"]


@pytest.mark.parametrize(
    ("stride", "size", "bandwidth"),
    [
        (1, 8, 450e9),
        (4, 2, 450e9),
        (8, 16, 50e9),  # one rank of the ring in each machine
        (2, 16, 4 * 50e9),
        (1, 16, 8 * 50e9),
        (1, 2048, 8 * 50e9),
    ],
)
def test_a_ring_leaves_a_machine_over_all_of_its_network_cards(stride, size, bandwidth) -> None:
    assert H100.link(stride, size).bandwidth == bandwidth


def test_a_collective_takes_its_bytes_and_its_steps() -> None:
    machine = replace(H100, inside=Link(100.0, 0.5, 2.0), collective=7.0)
    gather = Collective("all-gather", "tensor_parallel", 4, 400, "")
    assert machine.collective_seconds(gather, stride=1) == 7 + 3 * 2 + 300 / 50
    summed = replace(gather, kind="all-reduce")
    assert machine.collective_seconds(summed, stride=1) == 7 + 6 * 2 + 600 / 50
    assert machine.processor_seconds(summed) == 0
    assert machine.link_seconds(summed, stride=1) == machine.collective_seconds(summed, stride=1)


@pytest.mark.parametrize(
    ("kind", "sending", "adding"),
    [
        ("all-gather", 3 * 2 + 300 / 50, 0),
        ("reduce-scatter", 3 * 2 + 300 / 50, 300 / 25),
        ("all-reduce", 6 * 2 + 600 / 50, 300 / 25),
    ],
)
def test_a_processor_starts_collectives_and_adds_up_beside_others(kind, sending, adding) -> None:
    cpu = replace(H100, inside=Link(100.0, 0.5, 2.0), collective=7.0, processor=10.0, processor_adds=25.0)
    collective = Collective(kind, "tensor_parallel", 4, 400, "")
    assert cpu.collective_seconds(collective, stride=1) == 7 + sending + adding
    assert cpu.link_seconds(collective, stride=1) == sending
    assert cpu.processor_seconds(collective) == 7 + collective.sent / 10 + adding


def test_a_file_says_the_same(tmp_path) -> None:
    file = tmp_path / "hardware.json"
    file.write_text(H100.to_json())
    assert load_hardware(file) == H100 == load_hardware("H100") == load_hardware(H100)


@pytest.mark.parametrize("text", ["nothing", "{}", H100.to_json().replace("kernel", "colonel")])
def test_a_file_that_says_something_else_is_refused(tmp_path, text) -> None:
    file = tmp_path / "hardware.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"hardware.json does not describe hardware"):
        load_hardware(file)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'h1000' is neither a file nor one of a100, h100"):
        load_hardware("h1000")
    with pytest.raises(ValueError, match=r"H100 .* no rate for float64; it knows bfloat16, float32"):
        H100.peak(torch.float64)


def test_what_is_here_is_measured() -> None:
    found = measure_hardware("cpu", devices=1)
    assert isinstance(found, Hardware)
    assert found.devices == 1
    assert all(rate > 1e8 for rate in (*found.flops.values(), found.bandwidth))
    assert 0 < found.kernel < 1e-2
    assert 0 < found.shares["attention"] <= 1
    assert with_bandwidth(found, 5.0).inside.bandwidth == 5.0


def test_other_devices_are_not_measured() -> None:
    with pytest.raises(ValueError, match="device of type mps can do is not measured; only cpu and cuda are"):
        measure_rank(torch.device("mps"))


@pytest.mark.sweep
def test_links_between_ranks_are_measured() -> None:
    found = measure_hardware("cpu", devices=2)
    assert found.devices == 2
    assert 1e7 < found.inside.bandwidth < 1e12
    assert 0 < found.collective < 0.1
    assert found.processor_adds is None or found.processor_adds > 1e7
    assert found.processor == found.inside.bandwidth
