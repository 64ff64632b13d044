"""Tables of several ways to train."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from fabric_tp.measure.estimation import Estimate, gib, render
from fabric_tp.measure.prediction import Prediction


def table_of_estimates(found: Sequence[Estimate], where: str) -> str:
    """What a rank of each needs and sends."""
    table = Table(title=f"{found[0].model} on {where}", title_justify="left")
    for heading in ("tensor parallel", "data parallel", "activation checkpointing", "reshard after forward"):
        table.add_column(heading)
    for heading in ("peak, GiB", "GiB sent per step", "bytes sent per token"):
        table.add_column(heading, justify="right")
    for each in found:
        sent = each.sent()
        table.add_row(*_mesh(each), *_options(each), gib(each.memory.peak), gib(sent), f"{sent / each.tokens:,.0f}")
    return render(table)


def table_of_predictions(found: Sequence[Prediction], devices: int) -> str:
    """How fast each is."""
    where = f"on {devices} devices, predicted for {found[0].hardware.name}; tokens of each device"
    title = f"{found[0].estimate.model} {where}"
    table = Table(title=title, title_justify="left")
    for heading in ("tensor", "data", "batch", "checkpointing", "reshard", "overlap"):
        table.add_column(heading)
    for heading in ("peak, GiB", "ms a step", "tokens/s", "MFU", "waiting"):
        table.add_column(heading, justify="right")
    for prediction in found:
        each = prediction.estimate
        table.add_row(
            *_mesh(each),
            str(each.micro_batch_size),
            *_options(each),
            str(each.parallelize.overlap).lower(),
            gib(each.memory.peak, 1),
            f"{1000 * prediction.seconds:,.0f}",
            f"{prediction.tokens_per_second:,.0f}",
            f"{prediction.share_of_peak:.1%}",
            f"{sum(prediction.time.exposed.values()) / prediction.seconds:.0%}",
        )
    return render(table)


def _mesh(each: Estimate) -> tuple[str, str]:
    return str(each.tensor_parallel_size), str(each.data_parallel_size)


def _options(each: Estimate) -> tuple[str, str]:
    reshard = str(each.parallelize.reshard_after_forward).lower() if each.data_parallel_size > 1 else ""
    return each.parallelize.activation_checkpointing, reshard
