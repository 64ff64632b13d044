"""Writing what takes the place of something older, so that a crash at any moment leaves one of both."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

SHARD = ".distcp"
"""What torch.distributed.checkpoint calls the files of the ranks."""


@contextmanager
def replacing(path: Path, *, moves: bool, barrier: Callable[[], object], stale: Collection[str] = ()) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when all ranks have written.

    All ranks must enter. If any raises, or dies, ``path`` stays what it was. What else lies in a directory that is
    replaced stays there: only shards go.

    Args:
        path: A file or a directory, which may exist.
        moves: This rank moves files: the first one on the disk.
        barrier: Waits for all ranks.
        stale: Patterns of files that go as well when a directory is replaced.

    Example::

        with replacing(path, moves=fabric.is_global_zero, barrier=fabric.barrier) as unfinished:
            fabric_tp.checkpoint.litgpt.save(model, unfinished / "lit_model.pth")
    """
    unfinished, replaced = _hidden(path, "unfinished"), _hidden(path, "replaced")
    if moves:
        restore(path)
        _remove(unfinished)
        path.parent.mkdir(parents=True, exist_ok=True)
    barrier()
    yield unfinished
    barrier()
    if moves:
        _remove(replaced)
        if path.exists():
            path.rename(replaced)
        unfinished.rename(path)
        _keep_others(replaced, path, ("*" + SHARD, *stale))
        _remove(replaced)
    barrier()


def restore(path: Path) -> None:
    """Put back what a crash between the two renames of :func:`replacing` has left under another name."""
    replaced = _hidden(path, "replaced")
    if replaced.exists() and not path.exists():
        replaced.rename(path)


def keep_last(newest: Path, count: int) -> None:
    """Remove what is numbered as ``newest`` is, such as ``step-00000100``, but for it and the ``count - 1`` before it.

    To be called on one rank, once ``newest`` is whole. What has a higher number stays, and so does everything if the
    name has no number. A crash leaves nothing half-removed under its name.
    """
    remove_leftovers(newest)
    earlier = [path for path in _numbered_as(newest) if _number(path.name) <= _number(newest.name)]
    for path in earlier[:-count]:
        path.rename(removed := _hidden(path, "removed"))
        _remove(removed)


def remove_leftovers(path: Path) -> None:
    """Remove what crashes have left of ``path`` and of all that is numbered as it is; nobody may be writing these."""
    for state in ("unfinished", "removed", "replaced"):
        for leftover in _numbered_as(_hidden(path, state)):
            if state == "replaced":
                restore(leftover.with_name(leftover.name.removeprefix(".").removesuffix(f".{state}")))
            _remove(leftover)


def _hidden(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}")


def _numbered_as(path: Path) -> list[Path]:
    """All there is whose path differs from this one in its last number at most, the lowest first."""
    name = _NUMBER.sub("0", path.name)
    same = [each for each in path.parent.glob("*") if _NUMBER.sub("0", each.name) == name]
    return sorted(same, key=lambda each: _number(each.name))


def _number(name: str) -> int:
    found = _NUMBER.search(name)
    return int(found[0]) if found else -1


_NUMBER = re.compile(r"\d+(?=\D*$)", re.ASCII)
"""The last one in a name."""


def _keep_others(old: Path, new: Path, stale: Collection[str]) -> None:
    if old.is_dir() and new.is_dir():
        for each in old.iterdir():
            if not any(map(each.match, stale)) and not (new / each.name).exists():
                each.rename(new / each.name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
