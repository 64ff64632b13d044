"""Fabric with a model that needs no parallelism, on the ranks of the pool."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import current_process
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn

from fabric_tp import TensorParallelStrategy
from tests.fabric import as_under_torchrun


class Mean(nn.Module):
    """A model without collectives, so that ranks out of step show rather than hang."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean() * self.weight


def forked_workers(number: int) -> dict[str, Any]:
    """Arguments of a DataLoader on a rank of the pool, which would take seconds to spawn workers.

    What earlier tests left goes first: a worker's garbage collector would destroy groups whose threads it has not.
    """
    gc.collect()
    return {"num_workers": number, "multiprocessing_context": "fork" if number else None}


@contextmanager
def on_ranks(sizes: tuple[int, int], ours: bool = True, **options: Any) -> Iterator[L.Fabric]:
    """As under torchrun, on ``data_parallel_size, tensor_parallel_size = sizes`` ranks of the pool."""
    strategy = (
        TensorParallelStrategy(_unchanged, *sizes, fail_together=False, **options)
        if ours
        else ModelParallelStrategy(_unchanged, *sizes, **options)
    )
    with as_under_torchrun():
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            os.environ.pop(name, None)
        fabric = L.Fabric(accelerator="cpu", devices=sizes[0] * sizes[1], strategy=strategy)
        fabric.launch()
        current_process().daemon = False  # as which the pool's ranks could not start workers
        yield fabric


def gather(item: Any) -> list[Any]:
    """What each rank gives."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, item)
    return every


def _unchanged(module: nn.Module, mesh: Any) -> nn.Module:
    return module
