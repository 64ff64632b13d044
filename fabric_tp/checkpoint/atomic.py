"""Writing what takes the place of something older, so that a crash at any moment leaves one of both."""

from __future__ import annotations

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
    unfinished, replaced = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.replaced")
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
    replaced = path.with_name(f".{path.name}.replaced")
    if replaced.exists() and not path.exists():
        replaced.rename(path)


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
