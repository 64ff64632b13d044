"""The fastest ways to train a model on so many devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fabric_tp.measure.estimation import Estimate, Precision, estimate
from fabric_tp.measure.fit import fit
from fabric_tp.measure.hardware import Hardware, load_hardware
from fabric_tp.measure.prediction import Prediction, predict
from fabric_tp.parallelize import Parallelize

if TYPE_CHECKING:
    from litgpt import Config

RESERVED = 0.1
"""Of a device's memory, for what is not counted: the context, communicators, what the allocator wastes."""


def plan(
    model: str | Path | Config,
    parallelize: Parallelize | None = None,
    *,
    devices: int,
    hardware: str | Path | Hardware,
    micro_batch_sizes: Iterable[int] = (1, 2, 4),
    sequence_length: int | None = None,
    precision: Precision = "bf16-true",
) -> Iterator[Prediction]:
    """The ways that fit, each with its time: at most one for each mesh and micro-batch, and the same with ``overlap``.

    Args:
        model: As in :func:`estimate`, like the other arguments.
        parallelize: Its options are kept, other than activation checkpointing and ``reshard_after_forward``, which are
            chosen as by :func:`fit`.
        devices: All of them are used; tensor-parallel ranks are in one machine.
        hardware: As in :func:`predict`. A tenth of its memory is left free.
        micro_batch_sizes: Samples of each data-parallel rank, to be tried on each mesh.
        sequence_length: Tokens of a sample.
        precision: As in Fabric.
    """
    known = load_hardware(hardware)
    memory = int(known.memory * (1 - RESERVED))
    for size in micro_batch_sizes:
        for found in fit(
            model,
            parallelize,
            memory=memory,
            devices=devices,
            max_tensor_parallel_size=known.devices,
            micro_batch_size=size,
            sequence_length=sequence_length,
            precision=precision,
        ):
            yield predict(found, known)
            if size > 1 and found.tensor_parallel_size > 1 and not found.parallelize.compile:
                overlapped = _with_overlap(model, found)
                if overlapped.memory.peak <= memory:
                    yield predict(overlapped, known)


def fastest(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Sorted by the tokens of each second, the most first."""
    return sorted(predictions, key=lambda each: -each.tokens_per_second)


def _with_overlap(model: str | Path | Config, found: Estimate) -> Estimate:
    return estimate(
        model,
        replace(found.parallelize, overlap=True),
        tensor_parallel_size=found.tensor_parallel_size,
        data_parallel_size=found.data_parallel_size,
        micro_batch_size=found.micro_batch_size,
        sequence_length=found.sequence_length,
        precision=found.precision,
    )
