"""One rank of the recipe is killed in the middle of a step, under each launcher."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from .conftest import RECIPES
from .test_llama3 import environment, fabric_run, options, python, torchrun

DEADLINE = 15
"""Seconds from the death of a rank until all are gone."""


def command(launcher: Callable, out_dir: Path) -> list[str]:
    more = ("--max_steps", 100_000, "--log_interval", 1, "--eval_interval", 100_000, "--save_interval", 100_000)
    start = python() if launcher is python else launcher(2)
    return [*start, str(RECIPES / "llama3.py"), *options(out_dir, *more, "--tensor_parallel_size", 2)]


def rank_process(root: psutil.Process, rank: int, launcher: Callable) -> psutil.Process:
    if launcher is python and rank == 0:
        return root
    return next(each for each in root.children() if each.environ().get("LOCAL_RANK") == str(rank))


def wait_until(condition: Callable[[], bool], seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("launcher", [fabric_run, python, torchrun])
def test_a_killed_rank_ends_the_run(tmp_path: Path, launcher: Callable, killed: int) -> None:
    log = tmp_path / "log"
    with open(log, "w") as file:
        started = subprocess.Popen(
            command(launcher, tmp_path / "out"),
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    root = psutil.Process(started.pid)
    tree = [root]
    try:
        wait_until(lambda: "step 3/" in log.read_text() or started.poll() is not None, 150, log)
        assert started.poll() is None, log.read_text()
        tree += root.children(recursive=True)
        rank = rank_process(root, killed, launcher)
        rank.kill()
        wait_until(lambda: started.poll() is not None and not any(map(runs, tree)), DEADLINE, log)
        assert started.returncode != 0
        assert f"Rank {killed} (pid {rank.pid} on " in log.read_text()
        assert "was lost without a traceback" in log.read_text()
    finally:
        for each in tree:
            if runs(each):
                each.kill()
        started.wait(10)


def runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
