"""The time of a real step on real processes: ``python -m benchmarks.step_time``.

Two gloo ranks of one thread each against one process with as many threads, so that all use the same cores.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jsonargparse import auto_cli
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.llama import (
    Shape,
    Step,
    fabric_tp_step,
    litgpt_step,
    one_device_step,
    save_transformers,
    torch_plan_step,
    transformers_step,
)
from benchmarks.report import report

ALONE = "one process"
PEERS = ("fabric_tp", "torch's styles", "Transformers")
MEMORY: dict[str, dict[str, Any]] = {
    "without memory options": {"regather": False, "lean": False},
    "regather": {"lean": False},
    "lean": {"regather": False},
    "regather and lean, the default": {},
    "and fused_loss": {"fused_loss": True},
    "activation_checkpointing='selective'": {"activation_checkpointing": "selective"},
    "activation_checkpointing='full'": {"activation_checkpointing": "full"},
}
"""Options of ``fabric_tp.litgpt``."""


def main(
    *,
    shape: Shape = Shape(layers=4, width=512, heads=8, kv_heads=4, hidden=1408, vocabulary=8192, batch=1, length=256),  # noqa: B008
    tensor_parallel_size: int = 2,
    memory: bool = False,
    whole: bool = True,
    rounds: int = 12,
    out: Path | None = None,
) -> None:
    """Time a step, one way after the other: this library, torch's own styles, Transformers' plan, and one process.

    Args:
        shape: Of the model and the batch.
        tensor_parallel_size: Ranks, of one thread each.
        memory: Compare this library's memory options with each other instead, on litgpt's model.
        whole: The step with clipping and AdamW, and not only forward, loss and backward.
        rounds: Timed steps of each.
        out: A file for the figures, as JSON.
    """
    context = mp.get_context("spawn")
    folder = Path(tempfile.mkdtemp())
    ways = list(MEMORY) if memory else list(PEERS)
    if not memory:
        save_transformers(shape, folder / "transformers")
    pipes = [context.Pipe() for _ in range(tensor_parallel_size + 1)]
    processes = [
        context.Process(target=_rank, args=(rank, tensor_parallel_size, folder, shape, whole, ways, pipe), daemon=True)
        for rank, (_, pipe) in enumerate(pipes[:-1])
    ]
    processes.append(
        context.Process(target=_alone, args=(tensor_parallel_size, shape, whole, pipes[-1][1]), daemon=True)
    )
    for process in processes:
        process.start()
    ranks, alone = [ours for ours, _ in pipes[:-1]], [pipes[-1][0]]
    seconds = _take_turns(ways, ranks, alone, rounds)
    for connection in [*ranks, *alone]:
        connection.send(None)
    for process in processes:
        process.join()
    what = "A whole step" if whole else "Forward and backward"
    title = f"{what} on {tensor_parallel_size} gloo ranks, {shape.layers} layers of width {shape.width}"
    report(title, seconds, peer=ways[0] if memory else "torch's styles", setting=asdict(shape), out=out)


def _take_turns(
    ways: list[str], ranks: list[Connection], alone: list[Connection], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each round, after two that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in [*ways, ALONE]}
    for index in range(rounds + 2):
        for name, times in seconds.items():
            connections = alone if name == ALONE else ranks
            for connection in connections:
                connection.send(name)
            slowest = max(connection.recv() for connection in connections)
            if index >= 2:
                times.append(slowest)
    return seconds


def _rank(
    rank: int, size: int, folder: Path, shape: Shape, whole: bool, ways: list[str], connection: Connection
) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    names = ("data_parallel", "tensor_parallel")
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=names)["tensor_parallel"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))  # Transformers looks for them
    if ways == list(PEERS):
        peers = (
            fabric_tp_step(shape, whole, mesh),
            torch_plan_step(shape, whole, mesh),
            transformers_step(shape, whole, mesh, folder / "transformers"),
        )
        _serve(dict(zip(PEERS, peers, strict=True)), connection)
    else:
        _serve({name: litgpt_step(shape, whole, mesh, **MEMORY[name]) for name in ways}, connection)


def _alone(threads: int, shape: Shape, whole: bool, connection: Connection) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _serve({ALONE: one_device_step(shape, whole)}, connection)


def _serve(steps: dict[str, Step], connection: Connection) -> None:
    """Take the steps whose names come, until None comes."""
    for name in iter(connection.recv, None):
        start = time.perf_counter()
        steps[name]()
        connection.send(time.perf_counter() - start)


if __name__ == "__main__":
    auto_cli(main)
