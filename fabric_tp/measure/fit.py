"""The meshes and options with which a model fits a card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fabric_tp.measure.estimation import Estimate, Precision, check_arguments, estimate, least_of, peak_of
from fabric_tp.parallelize import ActivationCheckpointing, Parallelize, litgpt

if TYPE_CHECKING:
    from litgpt import Config


def fit(
    model: str | Path | Config,
    parallelize: Parallelize | None = None,
    *,
    memory: int,
    devices: int,
    max_tensor_parallel_size: int = 8,
    micro_batch_size: int = 1,
    sequence_length: int | None = None,
    precision: Precision = "bf16-true",
) -> Iterator[Estimate]:
    """The ways to train on so many devices that fit, at most one for each mesh.

    On each mesh the options are tried from the fastest to the leanest: without activation checkpointing, selective,
    full; each without and with freeing gathered parameters after the forward. The first that fits is the one. What a
    formula says cannot fit is not counted, unless parameters are frozen. :func:`cheapest` sorts them.

    Args:
        model: As in :func:`estimate`, like the other arguments.
        parallelize: Its other options are kept.
        memory: Bytes that the peak may take.
        devices: The number of ranks; each way uses them all.
        max_tensor_parallel_size: The devices of one machine.

    Raises:
        ValueError: As :func:`estimate`, or ``devices`` is below 1.
    """
    check_arguments(precision, devices=devices, micro_batch_size=micro_batch_size)
    parallelize = parallelize or litgpt()
    batch: dict[str, Any] = {"micro_batch_size": micro_batch_size, "sequence_length": sequence_length}
    from fabric_tp.architectures.litgpt.config import load_config, meta_model

    config = load_config(model)
    whole, tokens = meta_model(config), micro_batch_size * (sequence_length or config.block_size)
    follows_formula = all(parameter.requires_grad for parameter in whole.parameters())
    for size in range(1, min(devices, max_tensor_parallel_size) + 1):
        if devices % size:
            continue
        try:
            parallelize.check(whole, tensor_parallel_size=size)
        except ValueError:
            continue
        sizes = {"tensor_parallel_size": size, "data_parallel_size": devices // size}
        for option in _from_fast_to_lean(parallelize, devices // size):
            if follows_formula and peak_of(least_of(whole, option, sizes, tokens, precision)) > memory:
                continue
            found = estimate(config, option, **sizes, **batch, precision=precision)
            if found.memory.peak <= memory:
                yield found
                break


def cheapest(estimates: Iterable[Estimate]) -> list[Estimate]:
    """Sorted by the bytes that a rank sends for each token of the run, the fewest first."""
    return sorted(estimates, key=lambda each: (each.sent() / each.tokens, each.memory.peak))


def _from_fast_to_lean(parallelize: Parallelize, data_parallel_size: int) -> Iterator[Parallelize]:
    for checkpointing in get_args(ActivationCheckpointing):
        option = replace(parallelize, activation_checkpointing=checkpointing)
        if data_parallel_size > 1:
            yield replace(option, reshard_after_forward=False)
        yield replace(option, reshard_after_forward=True)
