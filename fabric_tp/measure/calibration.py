"""What the devices at hand can do, measured on all of them at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fabric_tp._torch import reduce_scatter
from fabric_tp.loss import cross_entropy
from fabric_tp.measure.hardware import Hardware, Link, parse_hardware
from fabric_tp.measure.operations import Work, record
from fabric_tp.measure.schedule import schedule
from fabric_tp.measure.step import default_dtype

ROUNDS, CHAIN = 20, 50
SIZES = {"cpu": (512, 2**19, 2**18), "cuda": (8192, 2**28, 2**26)}
"""By device: rows of a square product; numbers of a tensor that is read, and of one that is gathered. Such as models
have that one would train there."""


def measure_hardware(accelerator: str = "auto", devices: int = 2) -> Hardware:
    """Start a process for each device, and measure products, attention, memory and collectives, on all at once.

    Args:
        accelerator: As in Fabric.
        devices: That a machine has. Their links to other machines are taken to be as fast as those between them, which
            only a run on several machines could tell.
    """
    fabric = L.Fabric(accelerator=accelerator, devices=devices, strategy="ddp_spawn" if devices > 1 else "auto")
    return parse_hardware(fabric.launch(_measure))


def _measure(fabric: L.Fabric) -> str:
    if fabric.device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // fabric.world_size))
    return measure_rank(fabric.device).to_json()


def measure_rank(device: torch.device) -> Hardware:
    """What one rank can do while all ranks of the default process group, if there is one, do the same.

    Raises:
        ValueError: The device is neither a CPU nor a GPU of CUDA's kind.
    """
    if device.type not in SIZES:
        raise ValueError(f"What a device of type {device.type} can do is not measured; only {' and '.join(SIZES)} are.")
    rows, numbers, gathered = SIZES[device.type]
    flops = {name: _product_rate(device, rows, getattr(torch, name)) for name in ("float32", "bfloat16")}
    x = torch.randn(numbers, device=device)
    bandwidth = 3 * 4 * numbers / _seconds(lambda: x + x, device)  # into new memory, as in a step
    fixed, link, adds = _link(device, gathered)
    shares: dict[Work, float] = {
        "products": 1.0,
        "attention": min(1.0, _attention_rate(device) / flops["float32" if device.type == "cpu" else "bfloat16"]),
        "other operations": 1.0,
    }
    hardware = Hardware(
        name=_name(device),
        flops=flops,
        bandwidth=bandwidth,
        memory=_memory(device),
        devices=dist.get_world_size() if dist.is_initialized() else 1,
        inside=link,
        outside=link,
        shares=shares,
        kernel=_seconds(lambda: _train_little(device), device) / (2 * CHAIN),
        collective=fixed,
        processor=link.bandwidth if device.type == "cpu" else None,
        processor_adds=adds if device.type == "cpu" else None,
    )
    attained = _attained_in_a_step(hardware, device)
    return replace(hardware, shares={work: share * attained for work, share in hardware.shares.items()})


def _attained_in_a_step(hardware: Hardware, device: torch.device) -> float:
    """What a whole step attains of the rates that operations have alone, one after the other on warm caches; 1 at most,
    where something else disturbed these."""
    from fabric_tp.architectures.litgpt.config import make_model, yardstick

    config = yardstick(device.type)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with device, default_dtype(dtype):
        model = make_model(config)
        tokens = torch.zeros(1, config.block_size, dtype=torch.int64)

    def step() -> None:
        cross_entropy(model(tokens), tokens).backward()

    step()
    return min(1.0, schedule(record(step), hardware, {}).seconds / _seconds(step, device))


def with_bandwidth(hardware: Hardware, bandwidth: float) -> Hardware:
    """The same devices with another link between them, of so many bytes a second."""
    link = replace(hardware.inside, bandwidth=min(bandwidth, hardware.inside.bandwidth))
    return replace(hardware, inside=link, outside=link)


def _seconds(run: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """Of one call in a row, after all ranks have come here."""
    for _ in range(3):
        run()
    if dist.is_initialized():
        dist.barrier()
    times = []
    for _ in range(5):
        _finish(device)
        start = time.perf_counter()
        for _ in range(max(1, rounds // 5)):
            run()
        _finish(device)
        times.append((time.perf_counter() - start) / max(1, rounds // 5))
    return median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _train_little(device: torch.device) -> None:
    """Forward and backward of operations on a number."""
    y = torch.ones(1, device=device, requires_grad=True)
    for _ in range(CHAIN):
        y = y * 2.0
    y.backward()


def _product_rate(device: torch.device, rows: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
    return 2 * rows**3 / _seconds(lambda: a @ b, device)


def _attention_rate(device: torch.device) -> float:
    length, heads, width = (512, 4, 64) if device.type == "cpu" else (8192, 16, 128)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, heads, length, width, device=device, dtype=dtype) for _ in range(3))
    executed = 2 * heads * length**2 * width
    return executed / _seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), device)


def _link(device: torch.device, numbers: int) -> tuple[float, Link, float | None]:
    """Seconds of a gather of next to nothing, the link by which a large one takes longer, and by how much longer still
    one takes that adds up, in bytes a second; None if it does not.

    Each between products: ranks that come from one are not there at the same moment, and on a CPU the collective's
    threads must be woken.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0.0, Link(float("1e15"), 1.0, 0.0), None
    size, rows, name = dist.get_world_size(), SIZES[device.type][0], dist.group.WORLD.group_name  # type: ignore[union-attr]
    a, b = (torch.randn(rows, rows, device=device) for _ in range(2))

    def product() -> Tensor:
        return a @ b

    alone = _seconds(product, device)

    def gather(count: int) -> float:
        x = torch.zeros(count, device=device)
        parts = [torch.empty_like(x) for _ in range(size)]
        return _seconds(lambda: (product(), dist.all_gather(parts, x)), device) - alone

    def add(count: int) -> float:
        x = torch.zeros(size * count, device=device)
        return _seconds(lambda: (product(), reduce_scatter(x, size, name)), device) - alone

    small = max(gather(16), 1e-7)
    large, summed = (max(run(numbers), 2 * small) for run in (gather, add))
    sent = 4 * numbers * (size - 1)
    return small, Link(sent / (large - small), 1.0, 0.0), sent / (summed - large) if summed > large else None


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
