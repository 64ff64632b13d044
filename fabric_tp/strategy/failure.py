"""A rank that dies takes the others with it, within seconds and with the cause, instead of leaving them to wait."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from types import TracebackType
from typing import Any

import psutil
import torch.distributed as dist

from fabric_tp.strategy.connection import Member, connect, end, open_sockets, start_server

GLOO_SECONDS = 0.1
"""How long gloo's threads have to free what they last sent, before Python ends: later they would abort the process."""

EXIT_SECONDS = 10
"""How long a rank may take to end after an exception."""

INTERRUPT_SECONDS = 60
"""How long the others may go on after a rank got Ctrl-C: they may have got it as well, and have something to finish."""

MAIN_PID = "FABRIC_TP_MAIN_PID"


def watch(rank: int, world_size: int) -> None:
    """End this process when another rank dies, and the others when this one does.

    To be called on all ranks, once their process group exists. Further calls do nothing, nor does any with one rank.
    A process that ends in this way prints to stderr which rank failed and why, and exits with code 1, even if its main
    thread hangs in a collective. Once rank 0 has ended in order, the others are on their own.

    A process that ends itself by ``os._exit()``, which skips ``atexit``, should call :func:`leave` before.
    """
    global _watches, _awaits_ranks, _member, _chained_excepthook
    if world_size == 1 or _watches:
        return
    server: list[Any] = [start_server() if rank == 0 else None]
    dist.broadcast_object_list(server, src=0)
    _watches, _awaits_ranks = True, False
    _member = connect(rank, server[0])
    if _chained_excepthook is None:
        _chained_excepthook, sys.excepthook = sys.excepthook, _excepthook
    connected = [True] * world_size
    dist.all_gather_object(connected, _member is not None)  # rank 0's thread must not compete with what comes next
    if rank == 0 and not all(connected):
        warnings.warn(
            f"Ranks {[each for each, fine in enumerate(connected) if not fine]} cannot reach rank 0 at"
            f" {' or '.join(server[0]['addresses'])}, port {server[0]['port']}. If one of them dies, the others may"
            " wait for it until the process group's timeout.",
            stacklevel=2,
        )


def leave() -> None:
    """Say goodbye: this process may end, or go on alone, and nobody is alarmed. Python's exit does it by itself."""
    global _watches, _member
    if _member is not None:
        _member.leave()
    _watches, _member = False, None


def watch_parent() -> None:
    """End a process that Fabric's launcher started if the one that started it dies before the ranks have met.

    To be called before that launcher starts processes, and in these again; from :func:`watch` on they need it no more.
    """
    global _awaits_ranks
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.environ[MAIN_PID] = str(os.getpid())  # inherited by what is started
    elif MAIN_PID in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ and not (_awaits_ranks or _watches):
        _awaits_ranks = True
        threading.Thread(target=_outlive_no_parent, args=(int(os.environ[MAIN_PID]),), daemon=True).start()


_watches = False
_member: Member | None = None
_chained_excepthook: Any = None
_awaits_ranks = False


def _at_exit() -> None:
    leave()
    if dist.is_available() and dist.is_initialized():
        time.sleep(GLOO_SECONDS)


atexit.register(_at_exit)


def _after_fork() -> None:
    """A DataLoader's worker must not keep the connections of a dead rank open, nor speak for a living one."""
    global _watches, _awaits_ranks, _member
    _watches, _awaits_ranks, _member = False, False, None
    while open_sockets:
        descriptor = open_sockets.pop().detach()  # close() would wait for the file that reads it
        if descriptor >= 0:
            os.close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _outlive_no_parent(main: int) -> None:
    if os.getppid() == main:  # otherwise it has died while this process was importing
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(main).wait()
    if _awaits_ranks:
        end(f"The main process, pid {main}, has ended before the ranks met.")


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _chained_excepthook(kind, error, trace)
    if _member is None:
        return
    interrupted = issubclass(kind, KeyboardInterrupt)
    if not interrupted:
        with contextlib.suppress(AttributeError, ValueError):  # the kernel's, as Python's threads stop before its end
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(EXIT_SECONDS)
    place = traceback.extract_tb(trace)[-1:]
    where = f" ({place[0].filename}, line {place[0].lineno})" if place else ""
    what = f"{kind.__name__}: {error}".splitlines()[0][:1000]
    _member.fail(f"failed: {what}{where}", INTERRUPT_SECONDS if interrupted else 0)
