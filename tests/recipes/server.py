"""A process that has imported what takes seconds, and runs each program that it is asked for in a fork of itself.

Such a program is as if started afresh, except for these imports: it leads a session of its own, has its own arguments,
environment and output, and ends as the interpreter ends.
"""

import json
import os
import runpy
import signal
import sys
from importlib.metadata import entry_points
from typing import Any

import lightning.pytorch  # noqa: F401
import litgpt.pretrain  # noqa: F401


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
    os.environ.clear()
    os.environ.update(request["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


if __name__ == "__main__":
    command = serve()
    if command[0] == "python":
        sys.argv = command[1:]
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.argv = command
        (script,) = entry_points(group="console_scripts", name=command[0])
        sys.exit(script.load()())
