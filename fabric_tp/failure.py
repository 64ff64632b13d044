"""A rank that dies takes the others with it, within seconds and with the cause, instead of leaving them to wait.

Each rank keeps one connection to a thread in rank 0. The kernel closes it however a process ends, and TCP's keepalive
notices a machine that is gone; a rank that is merely slow is never taken for dead, since nobody asks it anything. A
rank that ends in order says goodbye first, and one that raises says what.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

KEEPALIVE = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 4}
"""After how many silent seconds the kernel asks a machine whether it is there, how often then, and how many times."""

CONNECT_SECONDS = 5.0
"""How long an address may take to answer as rank 0 does."""

ROOT_CAUSE_SECONDS = 0.5
"""How long after an exception another rank may be found dead, which is then reported as the cause."""

FAREWELL_SECONDS = 2.0
"""How long a rank that ends waits for rank 0 to hear of it."""

GLOO_SECONDS = 0.1
"""How long gloo's threads have to free what they last sent, before Python ends: later they would abort the process."""

EXIT_SECONDS = 10
"""How long a rank may take to end after an exception."""

INTERRUPT_SECONDS = 60
"""How long the others may go on after a rank got Ctrl-C: they may have got it as well, and have something to finish."""

LOST = "was lost without a traceback: killed, out of memory, or a crash in native code"
UNREACHABLE = "was lost: its machine, or the network to it, does not answer"
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
    server: list[Any] = [_start_server() if rank == 0 else None]
    dist.broadcast_object_list(server, src=0)
    _watches, _awaits_ranks = True, False
    _member = _connect(rank, server[0])
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
_member: _Member | None = None
_chained_excepthook: Any = None
_awaits_ranks = False
_sockets: set[socket.socket] = set()


def _at_exit() -> None:
    leave()
    if dist.is_available() and dist.is_initialized():
        time.sleep(GLOO_SECONDS)


atexit.register(_at_exit)


def _after_fork() -> None:
    """A DataLoader's worker must not keep the connections of a dead rank open, nor speak for a living one."""
    global _watches, _awaits_ranks, _member
    _watches, _awaits_ranks, _member = False, False, None
    while _sockets:
        descriptor = _sockets.pop().detach()  # close() would wait for the file that reads it
        if descriptor >= 0:
            os.close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _outlive_no_parent(main: int) -> None:
    if os.getppid() == main:  # otherwise it has died while this process was importing
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(main).wait()
    if _awaits_ranks:
        _end(f"The main process, pid {main}, has ended before the ranks met.")


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


def _end(message: str) -> NoReturn:
    """End this process from a thread, whatever its main thread is waiting for."""
    _print(message)
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # another thread may hold its lock for ever
    flush.start()
    flush.join(FAREWELL_SECONDS)
    os._exit(1)


def _print(message: str) -> None:
    os.write(2, f"fabric_tp: {message}\n".encode())  # sys.stderr's lock may be held for ever too


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _line(**message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


# Every rank


def _connect(rank: int, server: dict[str, Any]) -> _Member | None:
    for address in server["addresses"]:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((address, server["port"]), CONNECT_SECONDS)
            lines = connection.makefile("rb")
            if lines.readline() == _line(name=server["name"]):  # some addresses mean another machine to other ranks
                connection.settimeout(None)
                connection.sendall(_line(token=server["token"], rank=rank, pid=os.getpid(), host=socket.gethostname()))
                return _Member(rank, connection, lines, server["name"])
            connection.close()
    return None


class _Member:
    """A rank's end of its connection: it says one thing, goodbye or that it failed, and hears one, from rank 0."""

    def __init__(self, rank: int, connection: socket.socket, lines: Any, server: str) -> None:
        self.rank, self.connection, self.lines, self.server = rank, connection, lines, server
        self.ends = self.failed = False
        self.answered = threading.Event()
        _keep_alive(connection)
        _sockets.add(connection)
        threading.Thread(target=self._listen, daemon=True, name="fabric_tp.failure").start()

    def leave(self) -> None:
        if not self.failed:
            self._say_last(_line(goodbye=True))

    def fail(self, cause: str, grace: float) -> None:
        self.failed = True
        self._say_last(_line(cause=cause, grace=grace))

    def _say_last(self, line: bytes) -> None:
        self.ends = True
        with contextlib.suppress(OSError):
            self.connection.sendall(line)
            self.answered.wait(FAREWELL_SECONDS)

    def _listen(self) -> None:
        cause = LOST
        try:
            line = self.lines.readline()
        except OSError as error:
            line, cause = b"", _cause_of(error)
        heard: dict[str, Any] = {"rank": 0, "cause": f"{self.server} {cause}", "grace": 0}
        if line.endswith(b"\n"):
            heard = json.loads(line)
        if "goodbye" in heard or heard["rank"] == self.rank:
            self.answered.set()
            return
        message = f"{heard['cause']}. Rank {self.rank} ends as well."
        if self.failed:  # perhaps because of that
            _print(message)
        self.answered.set()
        if not self.ends:
            time.sleep(heard["grace"])
        if not self.ends:
            _end(message)


# Rank 0


def _start_server() -> dict[str, Any]:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual)
    _sockets.add(listener)
    name = _name(rank=0, pid=os.getpid(), host=socket.gethostname())
    server = _Server(listener, name, secrets.token_hex())
    threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True, name="fabric_tp.failure server").start()
    return {
        "addresses": list(dict.fromkeys(_own_addresses())),
        "port": listener.getsockname()[1],
        "name": name,
        "token": server.token,
    }


def _own_addresses() -> Iterator[str]:
    """Where the other ranks may find this one, the likeliest first; on one machine that is the loopback's address."""
    main = os.environ.get("MASTER_ADDR", "localhost")
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(main, 1, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing, but chooses the network
                yield probe.getsockname()[0]
    yield main
    yield socket.gethostname()  # on that machine itself, its name may mean the loopback's address


def _name(rank: int, pid: int, host: str) -> str:
    return f"Rank {rank} (pid {pid} on {host})"


def _cause_of(error: Exception) -> str:
    return LOST if isinstance(error, ConnectionError) else UNREACHABLE


class _Server:
    """Hears from all ranks, its own included, and tells them all of the first that fails."""

    def __init__(self, listener: socket.socket, name: str, token: str) -> None:
        self.listener, self.name, self.token = listener, name, token
        self.writers: dict[int, asyncio.StreamWriter] = {}
        self.tasks: set[asyncio.Task] = set()  # asyncio itself does not keep them

    async def serve(self) -> None:
        self.listener.setblocking(False)
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(self.listener)
            task = asyncio.create_task(self._hear(connection))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _hear(self, connection: socket.socket) -> None:
        _keep_alive(connection)
        _sockets.add(connection)
        reader, writer = await asyncio.open_connection(sock=connection)
        writer.write(_line(name=self.name))
        try:
            hello = json.loads(await reader.readline())
            known = secrets.compare_digest(hello.pop("token"), self.token)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:  # whatever it is, it is not one of the ranks
            _sockets.discard(connection)
            writer.close()
            return
        rank, name = hello["rank"], _name(**hello)
        self.writers[rank] = writer
        cause = LOST
        try:
            line = await reader.readline()
        except OSError as error:
            line, cause = b"", _cause_of(error)
        said: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {"cause": cause, "grace": 0}
        if "goodbye" in said:
            if rank == 0:
                self._tell_all(line)
            elif rank in self.writers:
                self.writers.pop(rank).write(line)
            return
        if line and not said["grace"]:
            await asyncio.sleep(ROOT_CAUSE_SECONDS)
        self._tell_all(_line(rank=rank, cause=f"{name} {said['cause']}", grace=said["grace"]))

    def _tell_all(self, line: bytes) -> None:
        """The last that they hear: who has said goodbye is not among them, nor is anyone told twice."""
        for rank in sorted(self.writers, reverse=True):  # rank 0 last: it may end this process at once
            self.writers.pop(rank).write(line)
