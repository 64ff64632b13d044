"""Collectives and bytes of a step against the least there can be: ``python -m benchmarks.communication``.

The least, with M the bytes of one residual stream (batch, length, width): with sequence parallelism each attention and
MLP gathers its input and scatters its output, and the reverse in the backward, and so do embedding and head; without
it each sends its output, and the gradient of its input, through an all-reduce. Two small all-reduces for the loss
(less where it is one with the head, which needs a sum over the ranks and no maximum), one for the gradients that are
partial sums, and one for their norm. What ``regather`` gathers again in the backward comes on top and is named.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

import fabric_tp
from benchmarks.llama import Shape
from benchmarks.memory_scaling import peer, shape_of
from benchmarks.plot import markdown
from fabric_tp.measure.communication import Collective, CollectiveKind, ring_bytes
from fabric_tp.measure.step import CountedStep

LARGE: tuple[CollectiveKind, ...] = ("all-gather", "reduce-scatter", "all-reduce")
Counts = dict[CollectiveKind, int]
OPTIONS: dict[str, dict[str, Any]] = {
    "fabric_tp": {},
    "fabric_tp, regather=False": {"regather": False},
    "fabric_tp, fused_loss=True": {"fused_loss": True},
}


def main(
    *,
    model: str = "Llama-3-8B",
    tensor_parallel_size: int = 8,
    length: int = 8192,
    out: Path = Path("benchmarks/plots"),
) -> None:
    """Count them on rank 0, for a Llama-3 shape.

    Args:
        model: A name of litgpt.
        tensor_parallel_size: Ranks.
        length: Tokens.
        out: A directory for the results.
    """
    shape = shape_of(model, length)
    stream = 2 * shape.length * shape.width  # bf16
    rows, results = [], {}
    for name, (step, expected) in steps(model, shape, tensor_parallel_size).items():
        large, small = split(step.collectives, stream)
        counts = Counter(each.kind for each in large)
        again = counts["all-gather"] - expected["all-gather"]
        wire = sum(ring_bytes(kind, stream, tensor_parallel_size) * number for kind, number in expected.items())
        sent = sum(each.sent for each in large)
        results[name] = {
            "collectives": dict(counts),
            "least": expected,
            "gathered again": again,
            "small": len(small),
            "bytes": sent,
            "least bytes": wire,
            "small bytes": sum(each.sent for each in small),
        }
        rows.append(
            [
                name,
                *(f"{counts[kind]} ({expected[kind]})" for kind in LARGE),
                str(again),
                str(len(small)),
                f"{sent / 2**30:.3f} ({wire / 2**30:.3f})",
            ]
        )

    headings = ["counted (least)", "all-gather", "reduce-scatter", "all-reduce", "gathered again", "small", "GiB sent"]
    table = markdown(headings, rows)
    print(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "communication.md").write_text(table)
    setting = {"model": model, "tensor_parallel_size": tensor_parallel_size, "length": length}
    (out / "communication.json").write_text(json.dumps({**setting, "ways": results}, indent=1) + "\n")


def steps(model: str, shape: Shape, tensor_parallel_size: int) -> dict[str, tuple[CountedStep, Counts]]:
    """What is counted, and the least there can be of it."""
    ways: dict[str, tuple[CountedStep, Counts]] = {}
    for sequence_parallel in (True, False):
        label = "sequence parallel" if sequence_parallel else "without"
        for name, options in OPTIONS.items():
            options = {"sequence_parallel": sequence_parallel, **options}
            if not sequence_parallel and "regather" in options:
                continue
            step: CountedStep = fabric_tp.estimate(
                model,
                fabric_tp.litgpt(**options),
                tensor_parallel_size=tensor_parallel_size,
                sequence_length=shape.length,
            )
            ways[f"{name}, {label}"] = step, least(shape.layers, sequence_parallel)
    ways["torch's styles, sequence parallel"] = (
        peer(model, 1, tensor_parallel_size, shape.length),
        least(shape.layers, True),
    )
    return ways


def least(layers: int, sequence_parallel: bool) -> Counts:
    """Collectives of the size of the residual stream in forward and backward of a Llama."""
    each = 2 * layers + 1  # attention and MLP of each layer; embedding in the forward, head in the backward
    if sequence_parallel:
        return {"all-gather": 2 * each, "reduce-scatter": 2 * each, "all-reduce": 0}
    return {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 2 * each}


def split(collectives: Iterable[Collective], stream: int) -> tuple[list[Collective], list[Collective]]:
    """Those of the residual stream, and the small ones of the loss, of partial gradients and of their norm."""
    large: list[Collective] = []
    small: list[Collective] = []
    for collective in collectives:
        (large if collective.nbytes >= stream else small).append(collective)
    return large, small


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    auto_cli(main)
