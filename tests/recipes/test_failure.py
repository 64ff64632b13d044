"""One rank of the recipe is killed in the middle of a step, under each launcher."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.programs import fabric_run, llama3, python, start, torchrun

from .runs import options

DEADLINE = 15
"""Seconds from the death of a rank until all are gone."""

FOREVER = ("--max_steps", 100_000, "--log_interval", 1, "--eval_interval", 100_000, "--save_interval", 100_000)


def rank_process(root: psutil.Process, rank: int, launcher: Callable) -> psutil.Process:
    if launcher is python and rank == 0:
        return root
    started = sorted(root.children(), key=lambda each: each.pid)
    return started[rank - 1 if launcher is python else rank]


def wait_until(condition: Callable[[], bool], seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def sweep(launcher: Callable, killed: int) -> object:
    return pytest.param(launcher, killed, marks=pytest.mark.sweep)


@pytest.mark.parametrize(
    ("launcher", "killed"),
    [(fabric_run, 0), sweep(fabric_run, 1), *(sweep(each, rank) for each in (python, torchrun) for rank in (0, 1))],
)
def test_a_killed_rank_ends_the_run(folder: Path, tmp_path: Path, launcher: Callable, killed: int) -> None:
    out_dir = folder / f"killed-{launcher.__name__}-{killed}"
    command = llama3(
        python() if launcher is python else launcher(2), options(out_dir, *FOREVER, "--tensor_parallel_size", 2)
    )
    program = start(command, log := tmp_path / "log")
    tree = [root := psutil.Process(program.pid)]
    try:
        program.wait_for("step 3/", 150)
        tree += root.children(recursive=True)
        rank = rank_process(root, killed, launcher)
        if launcher is not python:
            root.suspend()  # it ends the other rank as soon as it sees this one dead, perhaps before that can say so
        rank.kill()
        wait_until(lambda: f"Rank {killed} (pid {rank.pid} on " in log.read_text(), DEADLINE, log)
        assert "was lost without a traceback" in log.read_text()
        if launcher is not python:
            root.resume()
        wait_until(lambda: program.poll() is not None and not any(map(runs, tree)), DEADLINE, log)
        assert program.poll() != 0
    finally:
        for each in tree:
            if runs(each):
                each.kill()


def runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
