"""The time that identical inputs cost a step: ``python -m benchmarks.inputs``.

Two gloo ranks of one thread each train on the same dataloader: as it is, verified, and broadcast.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jsonargparse import auto_cli
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader

import fabric_tp
from benchmarks.llama import Llama, Shape
from benchmarks.report import report
from fabric_tp.data import Inputs

PLAIN = "plain dataloader"
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "verify_inputs=0": {"verify_inputs": 0},
    "verify_inputs=1": {"verify_inputs": 1},
    "verify_inputs=100": {"verify_inputs": 100},
    "broadcast_inputs=True": {"verify_inputs": 0, "broadcast_inputs": True},
}


def main(
    *,
    shape: Shape = Shape(layers=4, width=512, heads=8, kv_heads=4, hidden=1408, vocabulary=8192, batch=1, length=256),  # noqa: B008
    tensor_parallel_size: int = 2,
    rounds: int = 20,
    out: Path | None = None,
) -> None:
    """Time a step with its batch, one way after the other.

    Args:
        shape: Of the model and the batch.
        tensor_parallel_size: Ranks, of one thread each.
        rounds: Timed steps of each way.
        out: A file for the figures, as JSON.
    """
    context = mp.get_context("spawn")
    store = os.path.join(tempfile.mkdtemp(), "store")
    pipes = [context.Pipe() for _ in range(tensor_parallel_size)]
    processes = [
        context.Process(target=_rank, args=(rank, tensor_parallel_size, store, shape, pipe), daemon=True)
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for index in range(rounds + 2):
        for name in WAYS:
            for connection, _ in pipes:
                connection.send(name)
            slowest = max(connection.recv() for connection, _ in pipes)
            if index >= 2:
                seconds[name].append(slowest)
    for process in processes:
        process.kill()
    title = f"A step and its batch on {tensor_parallel_size} gloo ranks, {shape.layers} layers of width {shape.width}"
    report(title, seconds, peer=PLAIN, setting=asdict(shape), out=out)


def _rank(rank: int, size: int, store: str, shape: Shape, connection: Connection) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data_parallel", "tensor_parallel"))
    model = fabric_tp.llama(verify=False)(Llama(shape), mesh["tensor_parallel"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data = torch.randint(shape.vocabulary, (4096, shape.length + 1))
    ways = {name: _batches(data, shape.batch, mesh, options) for name, options in WAYS.items()}
    while True:
        batches, inputs = ways[connection.recv()]
        start = time.perf_counter()
        tokens = next(batches)
        arguments = (tokens[:, :-1].contiguous(),)
        if inputs:
            inputs.before_forward(model, arguments, {})
        fabric_tp.cross_entropy(model(*arguments), tokens[:, 1:].contiguous()).backward()
        optimizer.step()
        optimizer.zero_grad()
        connection.send(time.perf_counter() - start)


def _batches(
    data: Tensor, batch: int, mesh: DeviceMesh, options: dict[str, Any]
) -> tuple[Iterator[Tensor], Inputs | None]:
    dataloader: Any = DataLoader(data, batch)  # type: ignore[arg-type]
    if not options:
        return iter(dataloader), None
    inputs = Inputs(mesh, **options)
    return iter(inputs.setup(dataloader)), inputs


if __name__ == "__main__":
    auto_cli(main)
