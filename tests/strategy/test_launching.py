from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_tp.strategy.launching import Launcher, detect, launch, resolve_sizes
from tests import programs
from tests.programs import environment, fabric_run, finish, free_port, start, torchrun

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
FABRIC_RUN = {**TORCHRUN, "LT_CLI_USED": "1", "LT_DEVICES": "4", "LT_ACCELERATOR": "cpu"}
SLURM = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "train"}
SLURM_WITHOUT = {name: value for name, value in SLURM.items() if name != "SLURM_NTASKS_PER_NODE"}
BY_HAND = {"LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``started_with(env, gpus)`` pretends that a launcher set these variables, on a machine with so many GPUs."""

    def pretend(env: dict[str, str], gpus: int = 0) -> None:
        for name in os.environ.keys() - environment().keys():
            monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return pretend


def python(accelerator: str, devices: int, num_nodes: int, dp: int, tp: int, name: Any = "python") -> Launcher:
    fabric_arguments = {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes}
    return Launcher(name, devices * num_nodes, num_nodes, accelerator, dp, tp, fabric_arguments)  # type: ignore[arg-type]


def started(name: str, accelerator: str, dp: int, tp: int) -> Launcher:
    return python(accelerator, 4, 2, dp, tp, name)


@pytest.mark.parametrize(
    ("env", "gpus", "given", "expected"),
    [
        ({}, 0, {}, python("cpu", 1, 1, 1, 1)),
        ({}, 0, {"tensor_parallel_size": 2}, python("cpu", 2, 1, 1, 2)),
        ({}, 0, {"devices": 4, "data_parallel_size": 2}, python("cpu", 4, 1, 2, 2)),
        ({}, 0, {"devices": 2, "num_nodes": 2}, python("cpu", 2, 2, 2, 2)),
        ({}, 8, {}, python("cuda", 8, 1, 1, 8)),
        ({}, 8, {"tensor_parallel_size": 2}, python("cuda", 8, 1, 4, 2)),
        ({}, 8, {"tensor_parallel_size": 2, "data_parallel_size": 2}, python("cuda", 4, 1, 2, 2)),
        ({}, 8, {"accelerator": "cpu"}, python("cpu", 1, 1, 1, 1)),
        (BY_HAND, 0, {"tensor_parallel_size": 2}, python("cpu", 2, 1, 1, 2)),
        ({**SLURM, "SLURM_JOB_NAME": "bash"}, 0, {}, python("cpu", 1, 1, 1, 1)),
        (FABRIC_RUN, 0, {}, Launcher("fabric run", 8, 2, "cpu", 2, 4, {})),
        (FABRIC_RUN, 4, {"devices": 4, "num_nodes": 2}, Launcher("fabric run", 8, 2, "cpu", 2, 4, {})),
        (TORCHRUN, 0, {}, started("torchrun", "cpu", 2, 4)),
        (TORCHRUN, 4, {"tensor_parallel_size": 8}, started("torchrun", "cuda", 1, 8)),
        (SLURM, 0, {"data_parallel_size": 8}, started("slurm", "cpu", 8, 1)),
        ({**SLURM, **TORCHRUN}, 0, {}, started("torchrun", "cpu", 2, 4)),
    ],
)
def test_detect(started_with: Any, env: dict[str, str], gpus: int, given: dict[str, Any], expected: Launcher) -> None:
    started_with(env, gpus)
    assert detect(**given) == expected


@pytest.mark.parametrize(
    ("env", "gpus", "given", "match"),
    [
        ({}, 2, {"tensor_parallel_size": 4}, r"1 x 4 takes 4 GPUs on each machine, but 2 are visible"),
        ({}, 0, {"accelerator": "cuda", "tensor_parallel_size": 2}, r"1 x 2 takes 2 GPUs .* but 0 are visible"),
        ({}, 0, {"devices": 4, "tensor_parallel_size": 3}, r"1 x 3 = 3, but there are 4 .* 4 x 1, 2 x 2, 1 x 4\."),
        ({}, 0, {"devices": 0}, r"devices=0 "),
        ({}, 2, {"devices": 3}, r"devices=3 cannot be had with 2 GPUs"),
        ({}, 0, {"accelerator": "tpu"}, r"'tpu': tensor parallelism runs on"),
        (BY_HAND, 0, {"tensor_parallel_size": 4}, r"there are WORLD_SIZE=2 of them; but 4 were asked for"),
        (FABRIC_RUN, 0, {"devices": 2}, r"num_nodes=2 and devices=2 were asked for, but fabric run has started 4"),
        (FABRIC_RUN, 0, {"accelerator": "cuda"}, r"'cuda' was asked for, but fabric run has --accelerator cpu"),
        ({**FABRIC_RUN, "LT_DEVICES": "auto", "LT_ACCELERATOR": "auto"}, 8, {}, r"starts one .* --devices 8"),
        (TORCHRUN, 0, {"num_nodes": 1}, r"num_nodes=1 and devices=4 .* torchrun has started 4 processes on each of 2"),
        (TORCHRUN, 2, {}, r"takes 4 GPUs on each machine, but 2 are visible"),
        (TORCHRUN, 0, {"tensor_parallel_size": 3}, r"2 x 3 = 6, but there are 8 processes. These work: 8 x 1, 4 x 2"),
        ({**TORCHRUN, "WORLD_SIZE": "6"}, 0, {}, r"WORLD_SIZE=6 .* 2 machines, LOCAL_WORLD_SIZE=4"),
        ({**SLURM, "SLURM_NTASKS_PER_NODE": "2"}, 0, {}, r"SLURM_NTASKS=8 .*PER_NODE=2.* --ntasks-per-node=4"),
        (SLURM_WITHOUT, 0, {}, r"SLURM_NTASKS_PER_NODE=not set.* --nodes=2 --ntasks-per-node=4"),
    ],
)
def test_processes_that_do_not_fit(
    started_with: Any, env: dict[str, str], gpus: int, given: dict[str, Any], match: str
) -> None:
    started_with(env, gpus)
    with pytest.raises(ValueError, match=match):
        detect(**given)


@pytest.mark.parametrize(
    ("given", "processes", "nodes", "expected"),
    [
        ((None, None), 8, 2, (2, 4)),
        (("auto", "auto"), 8, 1, (1, 8)),
        (("auto", 2), 8, 2, (4, 2)),
        ((2, "auto"), 8, 1, (2, 4)),
        ((1, 8), 8, 2, (1, 8)),
        ((None, None), 1, 1, (1, 1)),
    ],
)
def test_sizes(given: tuple[Any, Any], processes: int, nodes: int, expected: tuple[int, int]) -> None:
    assert resolve_sizes(*given, processes, nodes) == expected


@pytest.mark.parametrize(
    ("given", "processes", "match"),
    [
        ((0, None), 4, r"data_parallel_size=0 must be at least 1"),
        ((None, -1), 4, r"tensor_parallel_size=-1 must be at least 1"),
        ((3, 2), 4, r"3 x 2 = 6, but there are 4 processes. These work: 4 x 1, 2 x 2, 1 x 4\."),
        ((None, 4), 6, r"1 x 4 = 4, but there are 6 processes"),
        ((None, 4), 2, r"1 x 4 = 4, but there are 2 processes"),
    ],
)
def test_sizes_that_do_not_fit(given: tuple[Any, Any], processes: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        resolve_sizes(*given, processes)


def test_a_launcher_has_been_told_everything(started_with: Any) -> None:
    started_with({})
    with pytest.raises(ValueError, match=r"Give devices to fabric_tp.launching.detect"):
        launch("ddp", launcher=detect(), devices=2)


SCRIPT = """
import os, sys, torch
from lightning.fabric.strategies import ModelParallelStrategy
import fabric_tp

strategy = ModelParallelStrategy(lambda model, mesh: model, data_parallel_size=1, tensor_parallel_size=2)
torch.set_num_threads(64)
fabric = fabric_tp.launch(strategy)
total = fabric.all_reduce(torch.tensor(fabric.global_rank + 1.0), reduce_op="sum")
assert tuple(fabric.strategy.device_mesh.shape) == (1, 2)
assert torch.get_num_threads() == max(1, len(os.sched_getaffinity(0)) // 2)
sys.stdout.write(f"rank {fabric.global_rank} of {fabric.world_size}: {total.item()}\\n")
sys.stdout.flush()
fabric.barrier()
"""

LAUNCHERS = {"python": programs.python, "torchrun": partial(torchrun, 2), "fabric run": partial(fabric_run, 2)}


@pytest.mark.swept(lambda p: p["name"] != "torchrun")  # recipes run under python and fabric run as well
@pytest.mark.parametrize("name", [*LAUNCHERS, "srun"])
def test_launch(tmp_path: Path, name: str) -> None:
    script, output = tmp_path / "script.py", tmp_path / "output"
    script.write_text(SCRIPT)
    if name == "srun":
        slurm = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
        slurm |= {"SLURM_JOB_NAME": "train", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [{**slurm, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
        started = [start([*programs.python(), str(script)], output, **rank) for rank in ranks]
    else:
        started = [start([*LAUNCHERS[name](), str(script)], output)]
    printed = finish(started)
    assert "rank 0 of 2: 3.0\n" in printed
    assert "rank 1 of 2: 3.0\n" in printed
