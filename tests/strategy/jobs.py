"""Ranks that run a script, as processes of their own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from fabric_tp.strategy import connection, failure

DEADLINE = 15
"""Seconds from the death of a rank until all are gone."""


IMPORT = f"""
import importlib.util, sys

def load(module, file):
    spec = importlib.util.spec_from_file_location(module, file)
    sys.modules[module] = importlib.util.module_from_spec(spec)  # without the package, which takes longer to import
    spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]

connection = load("fabric_tp.strategy.connection", {connection.__file__!r})
failure = load("fabric_tp.strategy.failure", {failure.__file__!r})
"""


SCRIPT = f"""
import os, sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
{IMPORT}
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


def environment(**more: str) -> dict[str, str]:
    launchers = ("LT_", "PL_", "SLURM_", "TORCHELASTIC_", "MASTER_", "FABRIC_TP_")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")
    env = {name: value for name, value in os.environ.items() if not name.startswith((*launchers, *ranks))}
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests" / "without_extras")])
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", **more}


class Job:
    """Ranks that run SCRIPT and then a body; what they print goes to files."""

    def __init__(self, folder: Path, body: str, size: int) -> None:
        self.folder, self.size, self.started = folder, size, []
        self.script = folder / "script.py"
        self.script.write_text(SCRIPT + body)

    def start(self, name: str, command: list[str], **env: str) -> subprocess.Popen:
        with open(self.folder / name, "w") as file:
            process = subprocess.Popen(
                command, env=environment(**env), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.started.append(process)
        return process

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
        for process in self.started:
            for each in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
                each.kill()
            if process.poll() is None:
                process.kill()


Start = Callable[..., Job]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
