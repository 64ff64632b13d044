"""What devices and the links between them can do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fabric_tp.measure.communication import Collective
from fabric_tp.measure.operations import Operation, Work


@dataclass(frozen=True)
class Link:
    """How a device reaches others."""

    bandwidth: float
    """Bytes a second that a device can send, at most."""
    share: float
    """Of the bandwidth, what collectives attain."""
    latency: float
    """Seconds from one rank of a ring to the next."""


_SHARES: dict[Work, float] = {"products": 0.52, "attention": 0.35, "other operations": 0.85}
_NVLINK = {"share": 0.42, "latency": 1e-6}
_NETWORK = {"share": 0.85, "latency": 4e-6}
"""Attained in whole training steps, waiting for the slowest rank included; ``python -m benchmarks.predicted`` fits the
products' and NVLink's to some of the published steps, and compares the others."""


@dataclass(frozen=True)
class Hardware:
    """Devices, and the machines they are in.

    The time of an operation is the longer one of its floating-point operations at the attainable rate and its bytes at
    the attainable bandwidth (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
    multicore architectures", 2009), and that of starting it. The time of a collective is that of a ring: latency and
    bandwidth (Hockney, "The communication challenge for MPP", 1994).
    """

    name: str
    flops: Mapping[str, float]
    """Floating-point operations a second at most, by dtype: ``"bfloat16"``, ``"float32"``."""
    bandwidth: float
    """Bytes a second to and from the device's memory, at most."""
    memory: int
    """Bytes of a device."""
    devices: int
    """In a machine."""
    inside: Link
    """Between devices of one machine."""
    outside: Link
    """From each device to other machines."""
    shares: Mapping[Work, float] = field(default_factory=lambda: dict(_SHARES))
    """What is attained: of ``flops`` in matrix products and in attention, of ``bandwidth`` in other operations."""
    kernel: float = 2e-6
    """Seconds to start an operation."""
    collective: float = 1.5e-5
    """Seconds to start a collective."""
    processor: float | None = None
    """Bytes a second at which a device's own processor moves what it sends, and computes nothing else meanwhile, as a
    CPU does; None where other parts do that."""
    processor_adds: float | None = None
    """Bytes a second at which the processor adds up what has come; None where that takes no time of its own."""

    def seconds(self, operation: Operation, fused: bool = False) -> float:
        """That an operation takes."""
        kernel = self.kernel if operation.starts_kernel or not fused else 0.0
        nbytes = operation.fused if fused else operation.nbytes
        moving = nbytes / (self.bandwidth * self.shares["other operations"])
        if not operation.executed:
            return kernel + moving
        return kernel + max(operation.executed / (self.peak(operation.dtype) * self.shares[operation.work]), moving)

    def peak(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second.

        Raises:
            ValueError: It is not known for this dtype.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in self.flops:
            raise ValueError(
                f"{self.name} says no rate for {name}; it knows {', '.join(self.flops)}. Add it to the file's flops."
            )
        return self.flops[name]

    def link(self, stride: int, size: int) -> Link:
        """Between so many ranks, of which neighbours are ``stride`` devices apart.

        A ring over several machines leaves each as often as it has ranks there, over as many network cards.
        """
        here = max(1, min(size, self.devices // stride))
        if here >= size:
            return self.inside
        bandwidth = min(self.outside.bandwidth * here, self.inside.bandwidth)
        return Link(bandwidth, self.outside.share, self.outside.latency)

    def collective_seconds(self, collective: Collective, stride: int) -> float:
        link = self.link(stride, collective.size)
        steps = (collective.size - 1) * (2 if collective.kind == "all-reduce" else 1)
        sending = steps * link.latency + collective.sent / (link.bandwidth * link.share)
        return self.collective + sending + self._adding_seconds(collective)

    def link_seconds(self, collective: Collective, stride: int) -> float:
        # For which the next collective has to wait: a processor starts one and adds up beside the next.
        seconds = self.collective_seconds(collective, stride)
        if self.processor is None:
            return seconds
        return seconds - self.collective - self._adding_seconds(collective)

    def processor_seconds(self, collective: Collective) -> float:
        if self.processor is None:
            return 0.0  # it keeps nothing from computing
        return self.collective + collective.sent / self.processor + self._adding_seconds(collective)

    def _adding_seconds(self, collective: Collective) -> float:
        adds = {"reduce-scatter": 1.0, "all-reduce": 0.5}.get(collective.kind, 0.0)  # of what is sent
        return adds * collective.sent / self.processor_adds if self.processor_adds else 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def parse_hardware(text: str) -> Hardware:
    """What :meth:`Hardware.to_json` wrote."""
    said: dict[str, Any] = json.loads(text)
    return Hardware(**{**said, **{key: Link(**said[key]) for key in ("inside", "outside")}})


GIB = 2**30

_H100 = Hardware(
    name="H100 SXM 80 GB",
    flops={"bfloat16": 989e12, "float32": 67e12},
    bandwidth=3.35e12,
    memory=80 * GIB,
    devices=8,
    inside=Link(450e9, **_NVLINK),
    outside=Link(50e9, **_NETWORK),
)
CARDS: dict[str, Hardware] = {
    "a100": replace(
        _H100,
        name="A100 SXM 80 GB",
        flops={"bfloat16": 312e12, "float32": 19.5e12},
        bandwidth=2.039e12,
        inside=Link(300e9, **_NVLINK),
        outside=Link(25e9, **_NETWORK),
    ),
    "h100": _H100,
    "h200": replace(_H100, name="H200 SXM 141 GB", bandwidth=4.8e12, memory=141 * 10**9),
    "b200": replace(
        _H100,
        name="B200 SXM 180 GB",
        flops={"bfloat16": 2250e12, "float32": 75e12},
        bandwidth=7.7e12,
        memory=180 * 10**9,
        inside=Link(900e9, **_NVLINK),
    ),
}
"""NVIDIA's data sheets, dense rates without sparsity; machines of eight cards with NVLink and a network card each, of
200 Gbit/s for A100 and 400 Gbit/s for the others. For other machines write :meth:`Hardware.to_json` to a file and edit
it."""


def load_hardware(name: str | Path | Hardware) -> Hardware:
    """A card by its name (``"h100"``), or what a JSON file says, with the fields of :class:`Hardware`.

    Raises:
        ValueError: There is neither such a card nor such a file, or the file says something else.
    """
    if isinstance(name, Hardware):
        return name
    if str(name).lower() in CARDS:
        return CARDS[str(name).lower()]
    file = Path(name)
    if not file.is_file():
        raise ValueError(f"hardware={str(name)!r} is neither a file nor one of {', '.join(CARDS)}.")
    try:
        return parse_hardware(file.read_text())
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not describe hardware: {error}. It needs the fields of fabric_tp.measure.Hardware, as"
            " `fabric-tp hardware` writes them."
        ) from error
