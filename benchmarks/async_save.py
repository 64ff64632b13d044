"""What a checkpoint costs the training: ``python -m benchmarks.async_save``.

Two gloo ranks of one thread each train with Fabric, and save at once or while they train on, in turn.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
import warnings
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.multiprocessing as mp
from jsonargparse import auto_cli

import fabric_tp
from benchmarks.llama import Llama, Shape
from benchmarks.report import report

NONE, AT_ONCE, ASYNC = "no checkpoint", "fabric.save", "async_save=True"
WAYS = (NONE, AT_ONCE, ASYNC)


def main(
    *,
    shape: Shape = Shape(layers=4, width=512, heads=8, kv_heads=4, hidden=1408, vocabulary=8192, batch=1, length=256),  # noqa: B008
    tensor_parallel_size: int = 2,
    steps: int = 8,
    rounds: int = 6,
    folder: Path | None = None,
    out: Path | None = None,
) -> None:
    """Time a save of model and AdamW, and so many steps that begin with one and end when it is written.

    Args:
        shape: Of the model and the batch.
        tensor_parallel_size: Ranks, of one thread each.
        steps: Steps of each round.
        rounds: Rounds of each way, after two that do not count: in the first the copy's memory is made.
        folder: On the disk to write to, by default where temporary files are.
        out: A file for the figures, as JSON.
    """
    context = mp.get_context("spawn")
    port = _free_port()
    pipes = [context.Pipe() for _ in range(tensor_parallel_size)]
    saves: dict[str, list[float]] = {name: [] for name in (AT_ONCE, ASYNC)}
    totals: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(dir=folder) as target:
        processes = [
            context.Process(
                target=_rank, args=(rank, tensor_parallel_size, port, shape, steps, Path(target), pipe), daemon=True
            )
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for index in range(rounds + 2):
            for name in WAYS:
                for connection, _ in pipes:
                    connection.send(name)
                save, total = map(max, zip(*(connection.recv() for connection, _ in pipes), strict=True))
                if index >= 2:
                    totals[name].append(total)
                    if name != NONE:
                        saves[name].append(save)
        for process in processes:
            process.kill()
            process.join()
    where = f"{tensor_parallel_size} gloo ranks, {shape.layers} layers of width {shape.width}"
    setting = {**asdict(shape), "steps": steps}
    report(f"The step that saves takes longer by, on {where}", saves, peer=AT_ONCE, setting=setting, out=out)
    report(f"{steps} steps with a checkpoint, until it is written", totals, peer=NONE, setting=setting, out=None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(rank: int, size: int, port: int, shape: Shape, steps: int, folder: Path, connection: Connection) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    os.environ.update({name: str(number) for name, number in {**numbers, "MASTER_PORT": port}.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="benchmark")  # as torchrun does
    strategies = {
        name: fabric_tp.TensorParallelStrategy(
            fabric_tp.llama(), 1, size, async_save=name == ASYNC, fail_together=False, verify_inputs=0
        )
        for name in WAYS
    }
    runs = {name: Run(strategy, shape) for name, strategy in strategies.items()}
    for name in iter(connection.recv, None):
        connection.send(runs[name](steps, None if name == NONE else folder / name))


class Run:
    """Model, optimizer and one batch, on one rank."""

    def __init__(self, strategy: fabric_tp.TensorParallelStrategy, shape: Shape) -> None:
        self.strategy = strategy
        self.fabric = L.Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=strategy)
        self.fabric.launch()
        self.fabric.seed_everything(0, verbose=False)
        self.model = self.fabric.setup(Llama(shape))
        self.optimizer: Any = self.fabric.setup_optimizers(
            torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        )
        self.tokens = torch.randint(shape.vocabulary, (shape.batch, shape.length + 1))

    def __call__(self, steps: int, path: Path | None) -> tuple[float, float]:
        """Seconds of the save, and of it and the steps."""
        self._step()  # which also makes the optimizer's state
        self.fabric.barrier()
        start = time.perf_counter()
        if path is not None:
            self.fabric.save(path, {"model": self.model, "optimizer": self.optimizer})
        saved = time.perf_counter()
        for _ in range(steps):
            self._step()
        self.strategy.wait_until_saved()
        self.fabric.barrier()
        return saved - start, time.perf_counter() - start

    def _step(self) -> None:
        loss = fabric_tp.cross_entropy(self.model(self.tokens[:, :-1]), self.tokens[:, 1:].contiguous())
        self.fabric.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()


if __name__ == "__main__":
    auto_cli(main)
