"""A process that has imported what takes seconds, and runs each program that it is asked for in a fork of itself.

Such a program is as if started afresh, except for these imports: it leads a session of its own, has its own arguments,
environment and output, and ends as the interpreter ends. So are the ranks that a launcher starts.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from typing import Any

import lightning.pytorch  # noqa: F401
import litgpt.pretrain  # noqa: F401
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import fabric_tp  # noqa: F401

CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000  # of sched.h

RANKS = 2
"""How many a launcher can start."""


def serve() -> list[str]:
    """Answer requests, a line each. Returns in the forks alone: the command that they are to run."""
    codes: dict[int, int | None] = {}  # None while the fork runs
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer = codes[request["poll"]] = exit_code(request["poll"], codes)
        else:
            answer = os.fork()
            if answer == 0:
                settle(request)
                return request["command"]
            codes[answer] = None
        print(json.dumps(answer), flush=True)
    for pid in codes:
        if exit_code(pid, codes) is None:
            os.killpg(pid, signal.SIGKILL)
    sys.exit()


def exit_code(pid: int, codes: dict[int, int | None]) -> int | None:
    if codes[pid] is not None:
        return codes[pid]
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def settle(request: dict[str, Any]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
    set_environment(request["environment"])
    if host := request.get("host"):
        move_to(**host)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


def move_to(namespace: str, name: str) -> None:
    """Enter a network namespace that ``ip netns`` has made, with a host name of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        failed = libc.setns(file.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS)
    failed = failed or libc.sethostname(name.encode(), len(name))
    if failed:
        raise OSError(ctypes.get_errno(), "this process cannot be put on a host of its own")


def set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


class Rank:
    """A fork that waits until the launcher starts it; to the launcher it is a `subprocess.Popen`."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid, self.pipe, self.returncode = pid, pipe, None

    def start(self, environment: dict[str, str], args: tuple[str, ...], start_new_session: bool, **more: Any) -> "Rank":
        assert start_new_session
        assert not any(more.values()), "its output goes where the launcher's goes"
        os.write(self.pipe, json.dumps([environment, args]).encode())
        os.close(self.pipe)
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return self.returncode


def ranks_of_launcher(command: list[str]) -> list[str]:
    """The command, in the launcher; in each rank that it starts, the rank's."""
    ranks: list[Rank] = []
    for _ in range(RANKS):
        theirs, ours = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            for rank in ranks:
                os.close(rank.pipe)
            return rank_command(theirs)
        os.close(theirs)
        ranks.append(Rank(pid, ours))
    waiting = iter(ranks)
    subprocess_handler.Popen = lambda env, **given: next(waiting).start(env, **given)
    return command


def rank_command(pipe: int) -> list[str]:
    """Wait to be started."""
    with open(pipe) as file:
        request = file.read()
    if not request:
        os._exit(0)  # the launcher has ended
    os.setsid()
    environment, (_, *args) = json.loads(request)
    set_environment(environment)
    return ["python", *(arg for arg in args if arg != "-u")]


def run(command: list[str]) -> None:
    program, *arguments = command
    if program != "python":
        sys.argv = command
        (script,) = entry_points(group="console_scripts", name=program)
        sys.exit(script.load()())
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    gc.freeze()  # or each fork would copy all that is imported, to look for garbage in it
    command = serve()
    if command[0] in ("fabric", "torchrun"):
        command = ranks_of_launcher(command)
    run(command)
