"""The minimal script, by the commands that it shows."""

import re
from pathlib import Path

import pytest

from tests.programs import RECIPES, fabric_run, finish, python, start

PROGRESS = re.compile(
    r"Initializing distributed: GLOBAL_RANK: \d, MEMBER: \d/\d|-+|distributed_backend=gloo"
    r"|All distributed processes registered\. Starting with \d processes|\[rank: \d\] Seed set to 42|"
)


def losses(launcher: list[str], output: Path) -> list[float]:
    """What it prints, in processes of its own."""
    lines = finish([start([*launcher, str(RECIPES / "minimal.py")], output)]).splitlines()
    steps = [step for line in lines if (step := re.fullmatch(r"step (\d+): loss (\d+\.\d+)", line))]
    assert [line for line in lines if not (line.startswith("step ") or PROGRESS.fullmatch(line))] == []
    assert [int(step[1]) for step in steps] == list(range(1, 17))
    return [float(step[2]) for step in steps]


@pytest.mark.sweep
def test_losses_fall_and_are_those_of_one_process(tmp_path: Path) -> None:
    one, two = losses(python(), tmp_path / "one"), losses(fabric_run(2), tmp_path / "two")
    assert one[-1] < 0.5 * one[0]
    assert two == pytest.approx(one, abs=1e-4)
