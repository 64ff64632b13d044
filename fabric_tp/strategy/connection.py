"""The connections by which ranks learn of each other's end: each rank has one to a thread in rank 0.

The kernel closes it however a process ends, and TCP's keepalive notices a machine that is gone; a rank that is merely
slow is never taken for dead, since nobody asks it anything. A rank that ends in order says goodbye first, and one that
raises says what.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

KEEPALIVE = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 4}
"""After how many silent seconds the kernel asks a machine whether it is there, how often then, and how many times."""

CONNECT_SECONDS = 5.0
"""How long an address may take to answer as rank 0 does."""

ROOT_CAUSE_SECONDS = 0.5
"""How long after an exception another rank may be found dead, which is then reported as the cause."""

FAREWELL_SECONDS = 2.0
"""How long a rank that ends waits for rank 0 to hear of it."""

LOST = "was lost without a traceback: killed, out of memory, or a crash in native code"
UNREACHABLE = "was lost: its machine, or the network to it, does not answer"

open_sockets: set[socket.socket] = set()
"""Of this process, for a forked one to close."""


def end(message: str) -> NoReturn:
    """End this process from a thread, whatever its main thread is waiting for."""
    say(message)
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # another thread may hold its lock for ever
    flush.start()
    flush.join(FAREWELL_SECONDS)
    os._exit(1)


def say(message: str) -> None:
    os.write(2, f"fabric_tp: {message}\n".encode())  # sys.stderr's lock may be held for ever too


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _line(**message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


# Every rank


def connect(rank: int, server: dict[str, Any]) -> Member | None:
    for address in server["addresses"]:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((address, server["port"]), CONNECT_SECONDS)
            lines = connection.makefile("rb")
            if lines.readline() == _line(name=server["name"]):  # some addresses mean another machine to other ranks
                connection.settimeout(None)
                connection.sendall(_line(token=server["token"], rank=rank, pid=os.getpid(), host=socket.gethostname()))
                return Member(rank, connection, lines, server["name"])
            connection.close()
    return None


class Member:
    """A rank's end of its connection: it says one thing, goodbye or that it failed, and hears one, from rank 0."""

    def __init__(self, rank: int, connection: socket.socket, lines: Any, server: str) -> None:
        self.rank, self.connection, self.lines, self.server = rank, connection, lines, server
        self.ends = self.failed = False
        self.answered = threading.Event()
        _keep_alive(connection)
        open_sockets.add(connection)
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
            say(message)
        self.answered.set()
        if not self.ends:
            time.sleep(heard["grace"])
        if not self.ends:
            end(message)


# Rank 0


def start_server() -> dict[str, Any]:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual)
    open_sockets.add(listener)
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
        open_sockets.add(connection)
        reader, writer = await asyncio.open_connection(sock=connection)
        writer.write(_line(name=self.name))
        try:
            hello = json.loads(await reader.readline())
            known = secrets.compare_digest(hello.pop("token"), self.token)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:  # whatever it is, it is not one of the ranks
            open_sockets.discard(connection)
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
