"""Ranks forked from processes that have imported everything, which takes ten seconds each time."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch.multiprocessing as mp


class Forks:
    """Starts the processes of ``Ranks(size, start=forks)``.

    Ranks 0, 2, ... have another origin than ranks 1, 3, ..., so that sets of strings are in another order on these,
    as in real processes.
    """

    def __init__(self) -> None:
        self._origins: dict[int, Origin] = {}

    def __call__(self, rank: int, target: Callable[..., None], args: tuple) -> Fork:
        parity = rank % 2
        if parity not in self._origins:
            self._origins[parity] = Origin()
        return Fork(self._origins[parity], target, args)

    def stop(self) -> None:
        for origin in self._origins.values():
            origin.stop()


class Origin:
    """A process that forks."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_fork_on_request, args=(theirs,), daemon=True)
        self._process.start()
        self._forks, self._numbers = 0, list[int]()

    def fork(self, target: Callable[..., None], args: tuple) -> int:
        """The number of the fork among this origin's; it does not wait for the origin's imports."""
        self._connection.send((target, args))
        self._forks += 1
        return self._forks - 1

    def process(self, fork: int) -> int:
        while len(self._numbers) < self._forks:
            self._numbers.append(self._connection.recv())
        return self._numbers[fork]

    def join(self, fork: int) -> int:
        """The exit code."""
        self._connection.send(self.process(fork))
        return self._connection.recv()

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


class Fork:
    """What ``Ranks`` needs of a process."""

    def __init__(self, origin: Origin, target: Callable[..., None], args: tuple) -> None:
        self._origin, self._fork = origin, origin.fork(target, args)
        self.exitcode: int | None = None

    def kill(self) -> None:
        if self.exitcode is None:
            os.kill(self._origin.process(self._fork), signal.SIGKILL)

    def join(self) -> None:
        if self.exitcode is None:
            self.exitcode = self._origin.join(self._fork)


def _fork_on_request(requests: Connection) -> None:
    """Fork for each function and its arguments, and answer with the process; wait for each process, with its code."""
    warnings.filterwarnings("ignore")
    __import__("tests.models")
    gc.freeze()  # or each fork would copy all that is imported, to look for garbage in it
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            request = requests.recv()
            if isinstance(request, int):
                requests.send(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]))
            else:
                requests.send(_fork(requests, *request))
                del request  # and with it this process's copy of the rank's connection, so that its end shows


def _fork(requests: Connection, target: Callable[..., None], args: tuple) -> int:
    if process := os.fork():
        return process
    requests.close()
    try:
        target(*args)
    finally:
        os._exit(1)
