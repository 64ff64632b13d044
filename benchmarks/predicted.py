"""Predicted against published speed of training steps: ``python -m benchmarks.predicted``.

Steps on H100 that use FSDP2 and tensor parallelism alone, in bf16, most of them torchtitan's.
Two constants are fitted, to four of them; the others say how far the prediction is to be trusted. What is predicted
are this library's steps; where torchtitan computes other things again, the mean of two of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import get_args

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

import fabric_tp
from fabric_tp.measure import Estimate, Hardware, estimate, load_hardware, predict
from fabric_tp.parallelize import ActivationCheckpointing

HARDWARE = Path(__file__).parent / "hardware" / "grand_teton.json"
PER_OPERATION: tuple[ActivationCheckpointing, ...] = ("none", "selective")
"""torchtitan's selective checkpointing keeps every other product: half of what ours computes again."""


@dataclass(frozen=True)
class Published:
    """A step on H100 cards with 2.4 TB/s, 500 W and 400 Gbit/s each (Meta's Grand Teton machines)."""

    source: str
    model: str
    mesh: tuple[int, int]
    """Data parallel, tensor parallel."""
    micro_batch_size: int
    sequence_length: int
    checkpointing: tuple[ActivationCheckpointing, ...]
    compile: bool
    tokens_per_second: float
    """Of each device."""
    fitted: bool = False
    unknown: str = ""
    """What was not said, and is taken as torchtitan has it by default."""


LLAMA = "docs/performance.md, 2024-12"
ASYNC = "benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md"
QWEN = "pull request 1690, 2025-09"
PUBLISHED = (
    Published(LLAMA, "Llama-3.1-8B", (8, 1), 2, 8192, PER_OPERATION, False, 5762, fitted=True),
    Published(LLAMA, "Llama-3.1-8B", (8, 1), 2, 8192, PER_OPERATION, True, 6667, fitted=True),
    Published(LLAMA, "Llama-3.1-8B", (128, 1), 2, 8192, PER_OPERATION, False, 5605),
    Published(LLAMA, "Llama-3.1-8B", (128, 1), 2, 8192, PER_OPERATION, True, 6514),
    Published(ASYNC, "Llama-3.1-8B", (8, 8), 12, 8192, PER_OPERATION, True, 4378, fitted=True),
    Published(ASYNC, "Llama-3-70B", (32, 8), 16, 8192, ("full",), True, 597.3),
    Published(QWEN, "Qwen3-32B", (8, 1), 2, 4096, ("full",), True, 1874, fitted=True),
    Published(QWEN, "Qwen3-32B", (4, 8), 16, 4096, ("full",), False, 876),
    Published(QWEN, "Qwen3-32B", (4, 8), 32, 4096, ("full",), False, 883),
    Published(QWEN, "Qwen3-32B", (8, 8), 32, 4096, ("full",), False, 873),
    Published("pull request 554, 2024-08", "Llama-3.1-405B", (16, 8), 2, 8192, ("full",), False, 109),
    Published("", "Llama-3.1-8B", (2, 2), 1, 8192, PER_OPERATION, False, 5378, unknown="batch, checkpointing, compile"),
    Published("", "Llama-3.1-8B", (8, 1), 2, 4096, ("none",), True, 9369, unknown="cards, batch, checkpointing"),
)


def main(*, fit: bool = False, out: Path | None = None) -> None:
    """Compare, and fit the shares of products and NVLink if asked.

    Args:
        fit: Fit the two constants first, and write them to benchmarks/hardware/grand_teton.json.
        out: A file for the figures, as JSON.
    """
    hardware = load_hardware(HARDWARE)
    if fit:
        hardware = _fitted(hardware)
        HARDWARE.write_text(hardware.to_json())
    rows = [(step, predicted(step, hardware)) for step in PUBLISHED]
    table = Table(title=f"Tokens per second and device, {hardware.name}", title_justify="left")
    for heading in (
        "model",
        "data x tensor",
        "batch",
        "checkpointing",
        "compile",
        "published",
        "predicted",
        "error",
        "",
    ):
        table.add_column(heading)
    for step, found in rows:
        table.add_row(
            step.model,
            "{} x {}".format(*step.mesh),
            f"{step.micro_batch_size} x {step.sequence_length}",
            "per operation" if step.checkpointing == PER_OPERATION else step.checkpointing[0],
            str(step.compile).lower(),
            f"{step.tokens_per_second:,.0f}",
            f"{found:,.0f}",
            f"{found / step.tokens_per_second - 1:+.0%}",
            "fitted" if step.fitted else f"not known: {step.unknown}" if step.unknown else "",
        )
    Console(width=150).print(table)
    if out:
        out.write_text(json.dumps([{**vars(step), "predicted": found} for step, found in rows], indent=1) + "\n")


def predicted(step: Published, hardware: Hardware) -> float:
    """Tokens per second and device; where it lies between two ways to checkpoint, of their mean time."""
    times = [predict(found, hardware).seconds for found in _estimates(step)]
    _, tensor = step.mesh
    return step.micro_batch_size * step.sequence_length / (sum(times) / len(times)) / tensor


@cache
def _estimates(step: Published) -> tuple[Estimate, ...]:
    data, tensor = step.mesh
    assert set(step.checkpointing) <= set(get_args(ActivationCheckpointing))
    return tuple(
        estimate(
            step.model,
            fabric_tp.litgpt(activation_checkpointing=checkpointing, regather=False, compile=step.compile),
            tensor_parallel_size=tensor,
            data_parallel_size=data,
            micro_batch_size=step.micro_batch_size,
            sequence_length=step.sequence_length,
            precision="bf16-mixed",
        )
        for checkpointing in step.checkpointing
    )


def _fitted(hardware: Hardware) -> Hardware:
    """First the products' share, by steps without tensor parallelism; then NVLink's, by one with it."""
    alone = [step for step in PUBLISHED if step.fitted and step.mesh[1] == 1]
    split = [step for step in PUBLISHED if step.fitted and step.mesh[1] > 1]
    shares = (replace(hardware, shares={**hardware.shares, "products": share / 100}) for share in range(40, 75))
    hardware = _best(shares, alone)
    links = (replace(hardware, inside=replace(hardware.inside, share=share / 100)) for share in range(30, 95))
    return _best(links, split)


def _best(candidates: Iterable[Hardware], steps: list[Published]) -> Hardware:
    def largest_error(hardware: Hardware) -> float:
        return max(abs(predicted(step, hardware) / step.tokens_per_second - 1) for step in steps)

    return min(candidates, key=largest_error)


if __name__ == "__main__":
    auto_cli(main)
