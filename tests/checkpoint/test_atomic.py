"""Which numbered checkpoints stay, and what crashes may leave of them."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from fabric_tp.checkpoint import atomic
from fabric_tp.checkpoint.atomic import keep_last, remove_leftovers


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "file").touch()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_stay(tmp_path) -> None:
    make(tmp_path, "step-8", "step-9", "step-10", "step-11")
    keep_last(tmp_path / "step-11", 2)
    assert names(tmp_path) == {"step-10", "step-11"}


def test_only_what_is_numbered_alike_goes(tmp_path) -> None:
    others = {"step-1.ckpt", "step-", "step-1-best", "epoch-1", "final", "logs"}
    make(tmp_path, "step-1", "step-2", *others)
    keep_last(tmp_path / "step-2", 1)
    assert names(tmp_path) == {"step-2", *others}


def test_files_go_as_well(tmp_path) -> None:
    for name in ("step-1.ckpt", "step-2.ckpt"):
        (tmp_path / name).touch()
    keep_last(tmp_path / "step-2.ckpt", 1)
    assert names(tmp_path) == {"step-2.ckpt"}


def test_higher_numbers_stay(tmp_path) -> None:
    """Of an earlier run, that went on for longer: its first is older, for all that is known."""
    make(tmp_path, "step-1", "step-2", "step-30")
    keep_last(tmp_path / "step-2", 1)
    assert names(tmp_path) == {"step-2", "step-30"}


def test_without_a_number_all_stay(tmp_path) -> None:
    make(tmp_path, "last", "best")
    keep_last(tmp_path / "last", 1)
    assert names(tmp_path) == {"last", "best"}


@pytest.mark.parametrize("crashes_in", ["rmtree", "rename"])
def test_a_crash_leaves_nothing_half_removed(tmp_path, crashes_in) -> None:
    make(tmp_path, "step-1", "step-2")
    holder = atomic.shutil if crashes_in == "rmtree" else Path
    with mock.patch.object(holder, crashes_in, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        keep_last(tmp_path / "step-2", 1)
    assert all((tmp_path / name / "file").exists() for name in names(tmp_path))
    make(tmp_path, "step-3")
    keep_last(tmp_path / "step-3", 1)
    assert names(tmp_path) == {"step-3"}


def test_leftovers_of_all_numbers_go(tmp_path) -> None:
    make(tmp_path, ".step-1.unfinished", ".step-2.removed", "step-3", ".step-3.replaced", ".final.unfinished")
    remove_leftovers(tmp_path / "step-9")
    assert names(tmp_path) == {"step-3", ".final.unfinished"}


def test_what_was_about_to_be_replaced_comes_back(tmp_path) -> None:
    make(tmp_path, ".step-3.replaced", ".step-3.unfinished")
    remove_leftovers(tmp_path / "step-9")
    assert names(tmp_path) == {"step-3"}
