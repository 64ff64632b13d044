"""Modules with random numbers follow the run's position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from fabric_tp.autograd.run_position import FORWARDS, RunPosition
from fabric_tp.styles import Colwise, Dropout, Rowwise
from fabric_tp.styles.random_module import follow_run
from fabric_tp.testing.ranks import mesh
from tests.styles.dropout_models import residual
from tests.styles.dropout_runs import parallelized, samples


def use_torchs_parallelize_module() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))

    mesh_1d: DeviceMesh = mesh(1, 2)["tensor_parallel"]
    plan: dict[str, Any] = {"0": Colwise(), "1": Dropout("features"), "2": Rowwise()}
    model = parallelize_module(build(), mesh_1d, plan)
    with pytest.raises(ValueError, match=r"does not know the seed.*from_plan\(plan\)"):
        model(torch.randn(2, 3, 8))
    follow_run(model, mesh_1d, seed=0)
    model(torch.randn(2, 3, 8))


def test_torchs_parallelize_module(pool) -> None:
    pool(2)(use_torchs_parallelize_module)


def assert_records_are_bounded() -> None:
    model = parallelized(residual, {}, (1, 1))
    position = model.transformer.h[0].post_mlp_norm.position
    for step in range(2 * FORWARDS):
        model(samples(step))
    assert len(position._forwards) == FORWARDS
    assert all(len(forward.records) == 4 for forward in position._forwards)


def test_records_are_bounded(pool) -> None:
    pool(1)(assert_records_are_bounded)


def test_generator_is_restored() -> None:
    position = RunPosition(seed=0)
    position.call("a")
    expected = torch.get_rng_state()
    draws = []
    for rank in (0, 0, 1):
        torch.set_rng_state(expected)
        with position.seeded("a", torch.device("cpu"), rank):
            draws.append(torch.rand(()).item())
        after = torch.get_rng_state()
        torch.set_rng_state(expected)
        position.call("a")  # which draws once
        assert torch.equal(after, torch.get_rng_state())
    assert len(set(draws)) == 3
