"""Checkpoints that are written while the training goes on.

This does what ``torch.distributed.checkpoint.async_save`` does, a staged copy and ``save`` in a thread, and in the same
thread what has to follow when all ranks have written: the new checkpoint takes its place, and old ones go.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save

from fabric_tp.checkpoint.atomic import keep_last, replacing
from fabric_tp.strategy.checkpoints import split
from fabric_tp.strategy.staging import Staging

REST = "meta.pt"
"""Where Fabric saves what is no model and no optimizer."""


class Writer:
    """Writes one checkpoint at a time in a thread, whose collectives have a process group of their own.

    To be made and used on all ranks. If a rank cannot write, all of them raise, with its cause.

    Args:
        timeout: How long a rank may wait for another one's thread.
        keep: As ``keep_last`` of the strategy.
    """

    def __init__(self, timeout: timedelta | None, keep: int | None) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._keep, self._moves = keep, dist.get_rank() == 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fabric_tp.save")
        self._stage = Staging()
        self._last: tuple[Path, Future[None]] | None = None

    def save(self, path: Path, state: Mapping[str, Any]) -> None:
        """Return when the state is copied; it may change from then on."""
        self.wait()
        shared, rest = split(state)
        staged = self._stage(shared)  # into the memory of the last one
        content = io.BytesIO()
        if self._moves:
            torch.save(rest, content)
        self._last = path, self._thread.submit(self._write, path, staged, content.getbuffer())
        _at_work.add(self)

    def wait(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            RuntimeError: It could not be written.
        """
        if self._last is None:
            return
        path, written = self._last
        try:
            written.result()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise RuntimeError(f"The checkpoint {str(path)!r} could not be written: {_cause(error)}") from error
        finally:
            if written.done():
                self._last = None
                _at_work.discard(self)

    def raise_if_failed(self) -> None:
        if self._last is not None and self._last[1].done():
            self.wait()

    def _write(self, path: Path, staged: Any, rest: memoryview) -> None:
        try:
            with replacing(path, moves=self._moves, barrier=self._barrier) as unfinished:
                target = FileSystemWriter(unfinished, per_thread_copy_ahead=0)  # nothing has to come from a GPU
                save(staged, storage_writer=target, process_group=self._group)
                if self._moves:
                    (unfinished / REST).write_bytes(rest)
            if self._moves and self._keep is not None:
                keep_last(path, self._keep)
            self._barrier()
        except (_OtherRankError, CheckpointException):  # all ranks raise it
            raise
        except BaseException as error:
            self._barrier(_named(error))
            raise

    def _barrier(self, error: str | None = None) -> None:
        """Wait for all ranks, and hear which of them have failed since the last time."""
        errors: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(errors, error, group=self._group)
        failed = {rank: each for rank, each in enumerate(errors) if each is not None}
        if failed and error is None:
            raise _OtherRankError("; ".join(f"rank {rank}: {each}" for rank, each in failed.items()))


class _OtherRankError(Exception):
    """What has failed on another rank."""


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # which would show the tracebacks of all ranks
        return "; ".join(f"rank {rank}: {_named(each)}" for rank, (each, _) in error.failures.items())
    return str(error) if isinstance(error, _OtherRankError) else _named(error)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


_at_work: set[Writer] = set()
"""Those whose last checkpoint nobody has waited for, and perhaps nobody else knows any more."""


def _at_exit() -> None:
    """Python has waited for the threads by now, but would end as if all were well. A fork's are nowhere."""
    for writer in list(_at_work):
        try:
            writer.raise_if_failed()
        except RuntimeError as error:
            sys.excepthook(type(error), error, error.__traceback__)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


atexit.register(_at_exit)
