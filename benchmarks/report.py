"""Figures as ratios against a peer of the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table


def report(
    title: str, seconds: Mapping[str, Sequence[float]], *, peer: str, setting: Mapping[str, object], out: Path | None
) -> None:
    """Print the median time of each way, and its ratio to ``peer``; write them to ``out`` as JSON."""
    medians = {name: median(times) for name, times in seconds.items()}
    table = Table(title=title, title_justify="left")
    for heading in ("", "ms, median", "min", "max", f"of {peer}"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, times in seconds.items():
        shown = [f"{1000 * value:.1f}" for value in (medians[name], min(times), max(times))]
        table.add_row(name, *shown, f"{medians[name] / medians[peer]:.2f}")
    Console(width=100).print(table)
    if out:
        result = {"setting": dict(setting), "seconds": medians, "of": peer}
        result["ratios"] = {name: value / medians[peer] for name, value in medians.items()}
        out.write_text(json.dumps(result, indent=2) + "\n")
