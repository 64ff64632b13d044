"""Ranks that run a script, as processes of their own."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.programs import Program, start

DEADLINE = 15
"""Seconds from the death of a rank until all are gone."""


SCRIPT = """
import atexit, os, sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
from fabric_tp.strategy import connection, failure

def forever():
    threading.Event().wait()

torch.set_num_threads(1)
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", timeout=timedelta(minutes=30))
failure.watch(rank, world_size)
failure.watch(rank, world_size)  # does nothing
dist.barrier()
os.write(1, b"rank %d met as pid %d\\n" % (rank, os.getpid()))  # a line at once: ranks may share the output
"""


class Job:
    """Ranks that run SCRIPT and then a body; what they print goes to files."""

    def __init__(self, folder: Path, body: str, size: int) -> None:
        self.folder, self.size, self.started = folder, size, list[Program]()
        self.script = folder / "script.py"
        self.script.write_text(SCRIPT + body)

    def start(self, name: str, command: list[str], **env: str) -> None:
        self.started.append(start(command, self.folder / name, **env))

    def output(self, name: str) -> str:
        return (self.folder / name).read_text()

    def everything(self) -> str:
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def wait_for(self, text: str) -> None:
        """Until each rank has printed it."""
        deadline = time.monotonic() + 60
        while self.everything().count(text) < self.size:
            assert time.monotonic() < deadline, self.everything()
            time.sleep(0.05)

    def wait_for_ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, once all have met."""
        self.wait_for("met as pid")
        found = re.findall(r"rank (\d+) met as pid (\d+)\n", self.everything())
        pids = {int(rank): int(pid) for rank, pid in found}
        return [psutil.Process(pids[rank]) for rank in range(self.size)]

    def wait(self, deadline: float = DEADLINE) -> list[int]:
        """The exit codes of what was started."""
        end = time.monotonic() + deadline
        while None in (codes := [process.poll() for process in self.started]):
            assert time.monotonic() < end, f"not all have ended\n{self.everything()}"
            time.sleep(0.05)
        return codes

    def stop(self) -> None:
        for program in self.started:
            if program.poll() is None:
                program.kill()


Start = Callable[..., Job]
