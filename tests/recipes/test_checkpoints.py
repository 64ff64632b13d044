"""Runs that stop before their end, and go on."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.programs import fabric_run, llama3, python, run_ranks, start

from .runs import STEPS, losses, options, rows


def interrupted_copy(out_dir: Path, copy: Path) -> Path:
    """What `out_dir` looked like after a crash in step 13, while a checkpoint was being written."""
    shutil.copytree(out_dir, copy, ignore=shutil.ignore_patterns("final", "step-00000020", "logs"))
    (copy / ".step-00000020.unfinished").mkdir()
    (copy / "step-00000013").mkdir()  # not complete
    (copy / "logs").mkdir()
    lines = (out_dir / "logs" / "metrics.csv").read_text().splitlines(keepends=True)
    (copy / "logs" / "metrics.csv").write_text("".join(lines[:14]))
    return copy


def test_resume_auto_continues_the_same_losses(folder: Path, run_1x1: Path) -> None:
    out_dir = interrupted_copy(run_1x1, folder / "resumed")
    output = run_ranks(1, options(out_dir, "--resume", "auto"))
    assert f"resumed from {out_dir / 'step-00000010'}" in output
    assert [int(row["step"]) for row in rows(out_dir)] == list(range(1, STEPS + 1))
    torch.testing.assert_close(losses(out_dir), losses(run_1x1), rtol=1e-6, atol=0)
    assert (out_dir / "final" / "lit_model.pth").is_file()


@pytest.mark.sweep
def test_resume_on_another_mesh(folder: Path, run_1x1: Path) -> None:
    out_dir = folder / "another-mesh"
    run_ranks(2, options(out_dir, "--resume", run_1x1 / "step-00000010"))
    assert [int(row["step"]) for row in rows(out_dir)] == list(range(11, STEPS + 1))
    torch.testing.assert_close(losses(out_dir), losses(run_1x1)[10:], rtol=1e-4, atol=0)


@pytest.mark.sweep
def test_asynchronous_checkpoints_are_the_same_and_old_ones_go(folder: Path, run_1x1: Path) -> None:
    out_dir = folder / "asynchronous"
    run_ranks(1, options(out_dir, "--async_save", "true", "--keep_last", 1))
    assert {path.name for path in out_dir.iterdir()} == {"logs", "final", "step-00000020"}
    shards = Path("step-00000020") / "__0_0.distcp"
    assert (out_dir / shards).read_bytes() == (run_1x1 / shards).read_bytes()
    assert torch.equal(losses(out_dir), losses(run_1x1))


def test_a_new_run_moves_an_earlier_one_aside(folder: Path, run_1x1: Path) -> None:
    out_dir = folder / "again"
    shutil.copytree(run_1x1, out_dir)
    run_ranks(1, options(out_dir, "--max_steps", 2, "--tokenizer_dir", run_1x1 / "final"))
    assert {path.name for path in out_dir.iterdir()} == {"logs", "final", "previous-1"}
    assert len(rows(out_dir)) == 2
    assert len(rows(out_dir / "previous-1")) == STEPS
    assert (out_dir / "previous-1" / "step-00000020" / "meta.pt").is_file()


@pytest.mark.parametrize("launcher", [pytest.param(python, marks=pytest.mark.sweep), fabric_run])
def test_ctrl_c_saves_and_says_how_to_go_on(folder: Path, run_1x1: object, launcher: Callable) -> None:
    out_dir = folder / f"interrupted-{launcher.__name__}"
    more = ("--max_steps", 100_000, "--log_interval", 1, "--tensor_parallel_size", 2)
    command = llama3(python() if launcher is python else fabric_run(2), options(out_dir, *more))
    program = start(command, folder / f"{out_dir.name}.log")
    program.wait_for("step 3/")
    os.killpg(program.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    code = program.wait(60)
    output = program.output.read_text()
    step = int(rows(out_dir)[-1]["step"])
    assert f"Stopped after step {step} and saved {out_dir / f'step-{step:08d}'}" in output
    assert (out_dir / f"step-{step:08d}" / "meta.pt").is_file()
    assert not (out_dir / "final").exists()
    if launcher is python:  # torchrun, which `fabric run` uses, always reports the signal that it got
        assert code == 0
        assert "Traceback" not in output
