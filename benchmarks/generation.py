"""How fast tokens are generated: ``python -m benchmarks.generation``.

litgpt's own ``generate`` in one process with all threads; this package in the same process; and in two of half as many
threads each, with gloo. All ways take turns in one run. What a token costs at least is to read all weights from memory
once: the share of that limit is told for the bandwidth that the same threads measure in the same run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from litgpt import GPT, Config
from litgpt.generate.base import generate_fn
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fabric_tp
from benchmarks.llama import litgpt_config
from fabric_tp.testing.ranks import Ranks, mesh

LITGPT, LIMIT = "litgpt, one process", "reading all weights once"
READ = 1 << 30
"""Bytes that are read to measure the memory's bandwidth: more than caches hold."""


@dataclass(frozen=True)
class Shape:
    layers: int = 16
    width: int = 1024
    heads: int = 16
    kv_heads: int = 4
    hidden: int = 2816
    vocabulary: int = 16384
    prompt: int = 32
    new: int = 64
    dtype: str = "float32"

    @property
    def config(self) -> Config:
        return litgpt_config(self, name="benchmark", block_size=4096)


def main(
    *,
    shape: Shape = Shape(),
    processes: int = 2,
    compile: bool = False,
    rounds: int = 7,
    out: Path | None = None,
) -> None:
    """Time each new token after the first, one way after the other.

    Args:
        shape: Of the model, the prompt and what follows.
        processes: Tensor-parallel ranks, which share this machine's cores.
        compile: Also time compiled decoding.
        rounds: Timed runs of each way, after one that does not count.
        out: A file for the figures, as JSON.
    """
    cores = len(os.sched_getaffinity(0))
    alone, several = Ranks(1), Ranks(processes)
    here, shared = partial(alone, _timed, cores), partial(several, _timed, max(1, cores // processes))
    ways: dict[str, Callable[[], float]] = {
        LITGPT: partial(here, _litgpt, shape),
        "fabric_tp, one process": partial(here, _fabric_tp, shape, False),
        f"fabric_tp, {processes} processes": partial(shared, _fabric_tp, shape, False),
    }
    if compile:
        ways["fabric_tp, one process, compiled"] = partial(here, _fabric_tp, shape, True)
        ways[f"fabric_tp, {processes} processes, compiled"] = partial(shared, _fabric_tp, shape, True)
    ways[LIMIT] = partial(here, _reading, shape)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name, way in ways.items():
            seconds[name] += [way()] if index else [way()][1:]
    alone.stop()
    several.stop()
    _report(seconds, shape, out)


def _timed(threads: int, way: Callable[..., float], *args: Any) -> float:
    """Seconds for a token."""
    torch.set_num_threads(threads)
    return way(*args)


@cache
def _model(shape: Shape, parallel: bool) -> nn.Module:
    torch.manual_seed(0)
    model = GPT(shape.config).to(getattr(torch, shape.dtype)).eval()
    size = torch.distributed.get_world_size()
    return fabric_tp.litgpt()(model, mesh(1, size)) if parallel else model


def _prompt(shape: Shape) -> Tensor:
    return torch.randint(shape.vocabulary, (shape.prompt,), generator=torch.Generator().manual_seed(0))


def _litgpt(shape: Shape) -> float:
    model: Any = _model(shape, False)
    whole = shape.prompt + shape.new
    model.max_seq_length = whole
    model.set_kv_cache(1, dtype=getattr(torch, shape.dtype))
    tokens = generate_fn(model, _prompt(shape), whole, temperature=0.0, include_prompt=False, include_eos=True)
    seconds = _for_each(tokens, shape)
    model.clear_kv_cache()
    return seconds


def _fabric_tp(shape: Shape, compile: bool) -> float:
    model = _model(shape, True)
    return _for_each(fabric_tp.generate_stream(model, _prompt(shape), shape.new, temperature=0, compile=compile), shape)


def _for_each(tokens: Any, shape: Shape) -> float:
    """The first is not timed: before it comes the prompt."""
    next(tokens)
    start = time.perf_counter()
    assert sum(1 for _ in tokens) == shape.new - 1
    return (time.perf_counter() - start) / (shape.new - 1)


def _reading(shape: Shape) -> float:
    """All weights but the embedding's, of which a token needs a row, at the bandwidth of a sum over memory."""
    block = torch.ones(READ // 4)
    block.sum()
    start = time.perf_counter()
    block.sum()
    bandwidth = READ / (time.perf_counter() - start)
    model: Any = _model(shape, False)
    read = sum(each.numel() * each.element_size() for each in model.parameters())
    embedding = model.transformer.wte.weight
    return (read - embedding.numel() * embedding.element_size()) / bandwidth


def _report(seconds: dict[str, list[float]], shape: Shape, out: Path | None) -> None:
    medians = {name: median(times) for name, times in seconds.items()}
    table = Table(title=f"A new token, {shape.layers} layers of width {shape.width}", title_justify="left")
    for heading in ("", "tokens/s, median", "min", "max", "of litgpt's", "of the limit"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, times in seconds.items():
        shown = [f"{1 / value:.1f}" for value in (medians[name], max(times), min(times))]
        shares = [f"{medians[peer] / medians[name]:.2f}" for peer in (LITGPT, LIMIT)]
        table.add_row(name, *shown, *shares)
    Console(width=110).print(table)
    if out:
        out.write_text(json.dumps({"setting": asdict(shape), "seconds": medians}, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main)
