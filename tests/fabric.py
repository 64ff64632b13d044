"""Fabric on the ranks of the pool, with our strategy or Fabric's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import fabric_tp
from fabric_tp.testing.ranks import mesh
from tests.models import LENGTH, VOCABULARY


@contextmanager
def on_ranks(
    sizes: tuple[int, int],
    ours: bool = True,
    precision: str | None = None,
    parallelize_fn: Any = None,
    plugins: Any = None,
    **options: Any,
) -> Iterator[L.Fabric]:
    """As under torchrun, on ``data_parallel_size, tensor_parallel_size = sizes`` ranks of the pool."""
    dp, tp = sizes
    function = parallelize_fn or fabric_tp.litgpt()
    if ours:
        options = {"fail_together": False, **options}
        strategy = fabric_tp.TensorParallelStrategy(function, dp, tp, **options)
    else:
        strategy = ModelParallelStrategy(function, dp, tp, **options)  # type: ignore[assignment]
    with as_under_torchrun():
        os.environ.pop("PL_GLOBAL_SEED", None)
        fabric = L.Fabric(
            accelerator="cpu",
            devices=dp * tp,
            strategy=strategy,
            precision=precision,  # type: ignore[arg-type]
            plugins=plugins,
        )
        fabric.launch()
        yield fabric


@contextmanager
def as_under_torchrun() -> Iterator[None]:
    """torchrun's environment on this rank of the pool, where each Fabric gets the mesh that the pool has already."""

    def shared(device_type: str, mesh_shape: tuple[int, int], *, mesh_dim_names: tuple[str, str]) -> DeviceMesh:
        assert (device_type, mesh_dim_names) == ("cpu", ("data_parallel", "tensor_parallel"))
        return mesh(*mesh_shape)

    with (
        mock.patch.dict(os.environ, torchrun_environment()),
        mock.patch("torch.distributed.device_mesh.init_device_mesh", shared),
    ):
        yield


def torchrun_environment() -> dict[str, str]:
    rank, size = str(torch.distributed.get_rank()), str(torch.distributed.get_world_size())
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": "0"}
    return {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "test"}


def data_parallel_rank(fabric: L.Fabric) -> int:
    return fabric.strategy.device_mesh.get_local_rank("data_parallel")  # type: ignore[attr-defined]


def batch(fabric: L.Fabric, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """This rank's inputs and targets, of ``size`` samples over all ranks."""
    mesh = fabric.strategy.device_mesh  # type: ignore[attr-defined]
    tokens = torch.randint(VOCABULARY, (size, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    mine = tokens.chunk(mesh["data_parallel"].size())[data_parallel_rank(fabric)]
    return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()
