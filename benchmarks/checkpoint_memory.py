"""Memory and time of reading and writing a directory of the hub: ``python -m benchmarks.checkpoint_memory``.

Memory is what the system counts as a process's own (RssAnon): pages of files that are mapped, which it can drop, are
not in it.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import nn

import fabric_tp
from fabric_tp.checkpoint import huggingface
from fabric_tp.testing.ranks import Ranks, mesh

MIB = 2**20
SHAPE: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "vocab_size": 32000}


def main(
    *,
    layers: int = 16,
    tensor_parallel_sizes: Sequence[int] = (2, 4),
    max_shard_size: str = "500MB",
    folder: Path | None = None,
    out: Path | None = None,
) -> None:
    """Read and write a Llama in bf16, and say how much more than its part of the model a rank needed at its peak.

    Args:
        layers: Of a width of 2048: 16 are 1.9 GB.
        tensor_parallel_sizes: Ranks that share the model.
        max_shard_size: Of a file.
        folder: Where the checkpoint is written.
        out: Where to write the figures as JSON.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        for size in tensor_parallel_sizes:
            ranks = Ranks(size)
            if not rows:
                ranks(_make, layers, size, max_shard_size, Path(directory) / "hub")
            rows.append(ranks(_measure, layers, size, max_shard_size, Path(directory)))
            ranks.stop()
    table = Table(*rows[0], title="Memory of a rank beside its part of the model, MiB", title_justify="left")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    if out:
        out.write_text(json.dumps(rows, indent=2) + "\n")


def _model(layers: int, size: int) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=layers, **SHAPE), dtype=torch.bfloat16)
    return fabric_tp.auto(verify=False)(model, mesh(1, size))


def _make(layers: int, size: int, max_shard_size: str, directory: Path) -> None:
    huggingface.save(_model(layers, size), directory, max_shard_size=max_shard_size)


def _measure(layers: int, size: int, max_shard_size: str, directory: Path) -> dict[str, Any]:
    model = _model(layers, size)
    whole, own = (sum(f(p) for p in model.parameters()) for f in (_bytes, lambda p: _bytes(p.to_local())))
    read, reading = _peak(lambda: huggingface.load(model, directory / "hub", progress=False))
    written, writing = _peak(lambda: huggingface.save(model, directory / "again", max_shard_size=max_shard_size))
    return {
        "tensor_parallel_size": size,
        "the whole model": round(whole / MIB),
        "a rank's part": round(own / MIB),
        "reading": round(read / MIB),
        "writing": round(written / MIB),
        "reading, s": round(reading, 1),
        "writing, s": round(writing, 1),
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _peak(act: Callable[[], object]) -> tuple[int, float]:
    """The most that any rank needed beside what it had before, and the time until all were done."""
    dist.barrier()
    before, seen, over = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            seen.append(_anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    act()
    dist.barrier()
    duration = time.perf_counter() - start
    over.set()
    thread.join()
    most = torch.tensor(max(seen))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most), duration


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    auto_cli(main)
