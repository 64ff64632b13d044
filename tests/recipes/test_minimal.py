"""The minimal script, by the commands that it shows."""

import re
import subprocess

import pytest

from .programs import BIN, RECIPES, environment, fabric_run

PROGRESS = re.compile(
    r"Initializing distributed: GLOBAL_RANK: \d, MEMBER: \d/\d|-+|distributed_backend=gloo"
    r"|All distributed processes registered\. Starting with \d processes|\[rank: \d\] Seed set to 42|"
)


def losses(launcher: list[str]) -> list[float]:
    """What it prints, in processes of its own."""
    command = [str(BIN / launcher[0]), *launcher[1:], str(RECIPES / "minimal.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not PROGRESS.fullmatch(line)] == []
    lines = [re.fullmatch(r"step (\d+): loss (\d+\.\d+)", line) for line in done.stdout.splitlines()]
    assert None not in lines, done.stdout
    assert [int(line[1]) for line in lines if line] == list(range(1, 17))
    return [float(line[2]) for line in lines if line]


def test_losses_fall_and_are_those_of_one_process() -> None:
    one, two = losses(["python"]), losses(fabric_run(2))
    assert one[-1] < 0.5 * one[0]
    assert two == pytest.approx(one, abs=1e-4)
