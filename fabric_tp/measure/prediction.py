"""The time of a step on hardware that need not be there, from an estimate's operations and collectives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fabric_tp.measure.estimation import Estimate, render
from fabric_tp.measure.hardware import Hardware, load_hardware
from fabric_tp.measure.schedule import StepTime, schedule
from fabric_tp.mesh import DATA_PARALLEL, TENSOR_PARALLEL

WIDTH = 40
"""Characters of the longest bar."""


@dataclass(frozen=True)
class Prediction:
    """What :func:`predict` found. ``print`` shows where the time goes."""

    estimate: Estimate
    hardware: Hardware
    time: StepTime

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.time.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of each device."""
        devices = self.estimate.data_parallel_size * self.estimate.tensor_parallel_size
        return self.estimate.tokens / self.seconds / devices

    @property
    def share_of_peak(self) -> float:
        """Model FLOPs utilization: what the model needs, of what the devices could compute."""
        dtype = torch.float32 if self.estimate.precision == "32-true" else torch.bfloat16
        each = self.estimate.model_flops / self.estimate.tokens
        return each * self.tokens_per_second / self.hardware.peak(dtype)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = {name: getattr(self, name) for name in ("seconds", "tokens_per_second", "share_of_peak")}
        return {**self.estimate.to_dict(), "hardware": self.hardware.name, **figures, **vars(self.time)}

    def __str__(self) -> str:
        table = Table(title=f"Time of a step, predicted for {self.hardware.name}", title_justify="left")
        for heading in ("", "ms", "share"):
            table.add_column(heading, justify="right" if heading else "left")
        table.add_column("")
        parts = dict(self.time.computing)
        parts |= {f"waiting, {axis.replace('_', ' ')}": each for axis, each in self.time.exposed.items() if each}
        for name, seconds in parts.items():
            share = seconds / self.seconds
            table.add_row(name, f"{1000 * seconds:,.1f}", f"{share:.0%}", "█" * round(WIDTH * share))
        table.add_section()
        table.add_row("step", f"{1000 * self.seconds:,.1f}")
        hidden = sum(self.time.hidden.values())
        table.add_row("collectives beside operations", f"{1000 * hidden:,.1f}")
        table.add_row("tokens per second and device", f"{self.tokens_per_second:,.0f}")
        table.add_row("share of peak (MFU)", f"{self.share_of_peak:.1%}")
        return render(table)


def predict(estimate: Estimate, hardware: str | Path | Hardware) -> Prediction:
    """How long an estimate's step takes: its operations, and collectives where the order of the program has them.

    Each tensor-parallel group is in one machine if it fits there, and neighbouring data-parallel ranks are
    ``tensor_parallel_size`` devices apart. With ``compile=True`` the operations of the blocks are fused between
    products and collectives. What the host needs to issue operations is not in it, nor how much collectives slow down
    products beside them.

    Args:
        estimate: Of a model, a mesh and options.
        hardware: A card by name, a JSON file, or the figures themselves.

    Raises:
        ValueError: The hardware is not known, or says nothing about this precision.

    Example::

        found = fabric_tp.estimate("Llama-3-8B", fabric_tp.litgpt(compile=True), tensor_parallel_size=8)
        print(fabric_tp.measure.predict(found, "h100"))
    """
    known = load_hardware(hardware)
    strides = {TENSOR_PARALLEL: 1, DATA_PARALLEL: estimate.tensor_parallel_size}
    time = schedule(estimate.events, known, strides, compiled=estimate.parallelize.compile)
    return Prediction(estimate, known, time)
