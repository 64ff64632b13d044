"""What a plan looks like, for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from io import StringIO

from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ParallelStyle

from fabric_tp.plan.plan import covers, resolve, tied_parameters
from fabric_tp.styles import Style


def table(
    plan: Mapping[str, ParallelStyle], model: nn.Module, *, tensor_parallel_size: int, data_parallel_size: int = 1
) -> str:
    """What is sharded how: a row per pattern of the plan and parameter."""
    if data_parallel_size < 1:
        raise ValueError(f"data_parallel_size={data_parallel_size} must be at least 1.")
    rows = Table(title=f"tensor parallel {tensor_parallel_size} x data parallel {data_parallel_size}", title_style="")
    for heading in ("module", "style", "parameter", "whole", "per rank", "forward", "backward"):
        rows.add_column(heading, overflow="fold")
    counts: dict[str, tuple[int, int]] = {}
    for pattern, modules in resolve(plan, model):
        style, (_, module) = plan[pattern], modules[0]
        forward, backward = _collectives(style, module, tensor_parallel_size)
        label = f"{pattern or '(the model)'} x {len(modules)}" if len(modules) > 1 else pattern or "(the model)"
        first = (label, type(style).__name__)
        shapes = dict(_shapes(style, module, tensor_parallel_size))
        if not shapes:
            rows.add_row(*first, "", "", "", forward, backward)
        for name, (whole, local) in shapes.items():
            rows.add_row(*first, name, _times(whole), _times(local), forward, backward)
            first, forward, backward = ("", ""), "", ""
        for owner, each in modules:
            for name, (whole, local) in _shapes(style, each, tensor_parallel_size):
                counts[f"{owner}.{name}" if owner else name] = math.prod(whole), math.prod(local)
    for _, *again in tied_parameters(model):
        for name in again:
            counts.pop(name, None)
    console = Console(file=StringIO(), width=200, force_terminal=False)
    console.print(rows)
    whole_total, rank_total = (sum(numbers[i] for numbers in counts.values()) for i in range(2))
    per_rank = math.ceil(rank_total / data_parallel_size)
    text = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    return f"{text}\n{whole_total:,} parameters, about {per_rank:,} of them on each rank\n"


def _collectives(style: ParallelStyle, module: nn.Module, size: int) -> tuple[str, str]:
    if not isinstance(style, Style):
        return "?", "?"
    splits = any(isinstance(placement, Shard) for placement in style.placements(module).values())
    if not splits or not style.uncut or style.uncut.splits_evenly(size):
        return style.collectives()
    forward, backward = (f"{each} + all-to-all".removeprefix(" + ") for each in style.collectives())
    return forward, backward


def _shapes(
    style: ParallelStyle, module: nn.Module, size: int
) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Whole and per rank, of each parameter that the module holds when it is parallelized."""
    if isinstance(style, Style):
        shapes, placements = style.shapes(module), style.placements(module)
    else:
        shapes, placements = {name: module.get_parameter(name).shape for name in sorted(covers(style, module))}, {}
    for name, whole in shapes.items():
        placement = placements.get(name)
        dim = placement.dim if isinstance(placement, Shard) else None
        yield name, (tuple(whole), tuple(-(-n // size) if i == dim else n for i, n in enumerate(whole)))


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
