"""Runs a script, and kills ranks of it at a moment: ``killed.py MOMENT SCRIPT ARGUMENTS``.

Files are watched by an audit hook, so that the script and what it calls are as always.
"""

import json
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

MOVES = ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
CHANGES = (*MOVES, "open", "os.mkdir")


def kill(pids: Path, ranks: list[int]) -> None:
    """This rank is the last one, if it is one of them."""
    of_ranks = json.loads(pids.read_text())
    for pid in sorted((of_ranks[rank] for rank in ranks), key=lambda pid: pid == os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def place(out_dir: str, event: str, arguments: tuple) -> str:
    """Where in the run this event is, or ""."""
    if event not in CHANGES or not isinstance(arguments[0], (str, os.PathLike)):
        return ""
    path = os.fspath(arguments[0])
    if not path.startswith(f"{out_dir}/") or (event == "open" and not writes(*arguments[1:])):
        return ""
    name = path.removeprefix(f"{out_dir}/").split("/")[0].strip(".")
    if name.startswith("step-"):
        return "renaming" if event in MOVES and path.count("/") == out_dir.count("/") + 1 else "writing"
    return {"final": "final", "final.unfinished": "final", "final.replaced": "final", "logs": "logging"}.get(name, "")


def writes(mode: str | None, flags: int) -> bool:
    return flags & (os.O_WRONLY | os.O_RDWR) != 0


def count_down(place: str, count: int, delay: float, then: Callable[[], None]) -> Callable[[str], None]:
    """What is told where the run is, and calls ``then`` so many seconds after the ``count``-th time at this place."""
    left = [count]

    def at(where: str) -> None:
        if where != place:
            return
        left[0] -= 1
        if left[0] == 0:
            if delay:
                threading.Timer(delay, then).start()
            else:
                then()

    return at


def before(holder: Any, name: str, call: Callable[[], None]) -> None:
    function = getattr(holder, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        call()
        return function(*args, **kwargs)

    setattr(holder, name, called)


if __name__ == "__main__":
    moment = json.loads(sys.argv[1])
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    if int(os.environ["RANK"]) == moment["rank"]:
        from fabric_tp.strategy import strategy
        from fabric_tp.strategy.staging import Staging

        at = count_down(
            moment["place"], moment["count"], moment["delay"], lambda: kill(Path(moment["pids"]), moment["killed"])
        )
        before(strategy, "clip_grad_norm", lambda: at("training"))
        before(Staging, "__call__", lambda: at("staging"))
        sys.addaudithook(lambda event, arguments: at(place(moment["out_dir"], event, arguments)))
    runpy.run_path(sys.argv[0], run_name="__main__")
