"""Ranks in processes of their own: one of them dies, while the others wait for something that does not notice."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

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
    root = str(Path(__file__).parents[2])
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", **more}


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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(body, size)``: processes that nobody watches over, with an output for each: "0.log", "1.log", ..."""
    jobs = []

    def start(body: str, size: int = 2) -> Job:
        jobs.append(job := Job(tmp_path, body, size))
        port = free_port()
        for rank in map(str, range(size)):
            env = {"RANK": rank, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            job.start(f"{rank}.log", [sys.executable, str(job.script)], **env)
        return job

    yield start
    for job in jobs:
        job.stop()


WAYS_TO_HANG = {
    "event": "forever()",
    "recv from a living rank": "forever() if rank == 2 else dist.recv(torch.zeros(1), src=2)",
}


@pytest.mark.parametrize(("killed", "hang"), [(0, "event"), (1, "event"), (1, "recv from a living rank")])
def test_a_killed_rank_ends_the_others(start: Start, killed: int, hang: str) -> None:
    job = start(WAYS_TO_HANG[hang], 3)
    ranks = job.wait_for_ranks()
    ranks[killed].kill()
    assert job.wait() == [-signal.SIGKILL if rank == killed else 1 for rank in range(3)]
    lost = f"Rank {killed} (pid {ranks[killed].pid} on {socket.gethostname()}) was lost without a traceback: killed"
    for rank in {0, 1, 2} - {killed}:
        assert lost in job.output(f"{rank}.log")
        assert f"Rank {rank} ends as well" in job.output(f"{rank}.log")


@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_ends_the_others(start: Start, failing: int) -> None:
    job = start(f'if rank == {failing}: raise ValueError("bad batch\\nmore")\nforever()')
    assert job.wait(60) == [1, 1]
    failed, other = job.output(f"{failing}.log"), job.output(f"{1 - failing}.log")
    assert "Traceback" in failed
    assert "ValueError: bad batch" in failed
    assert "ends as well" not in failed
    assert f"Rank {failing} (pid" in other
    assert f"failed: ValueError: bad batch ({job.script}, line" in other
    assert "Traceback" not in other


def test_an_exception_after_a_death_does_not_hide_its_cause(start: Start) -> None:
    job = start("if rank == 1: forever()\ndist.recv(torch.zeros(1), src=1)")
    ranks = job.wait_for_ranks()
    ranks[1].kill()
    assert job.wait() == [1, -signal.SIGKILL]
    assert "Rank 1 (pid" in job.output("0.log")
    assert "was lost without a traceback" in job.output("0.log")


def test_a_failing_rank_ends_although_a_thread_of_it_does_not(start: Start) -> None:
    job = start("if rank == 1:\n    threading.Thread(target=forever).start()\n    raise ValueError\nforever()")
    job.wait_for_ranks()
    assert job.wait(DEADLINE) == [1, -signal.SIGALRM]


@pytest.mark.parametrize(("first", "how"), [(0, "pass"), (1, "sys.exit(0)"), (1, "sys.exit(3)")])
def test_a_rank_may_end_before_the_others(start: Start, first: int, how: str) -> None:
    goes_on = "pid = [None, None]; dist.all_gather_object(pid, os.getpid())\n"
    goes_on += f"if rank == {first}:\n    {how}\nelse:\n    import psutil\n"
    goes_on += f"    psutil.wait_procs([psutil.Process(pid[{first}])])\n    time.sleep(1)\n    print('went on')\n"
    job = start(goes_on)
    codes = job.wait(60)
    assert codes[1 - first] == 0
    assert codes[first] == (3 if "3" in how else 0)
    assert "went on" in job.output(f"{1 - first}.log")
    assert "fabric_tp" not in job.everything()


def test_a_rank_may_leave(start: Start) -> None:
    job = start("if rank == 1:\n    failure.leave()\n    os._exit(0)\ntime.sleep(2)\n")
    assert job.wait(60) == [0, 0]
    assert "fabric_tp" not in job.everything()


def test_sigterm_ends_a_rank_as_always(start: Start) -> None:
    job = start("forever()")
    job.wait_for_ranks()[1].terminate()
    assert job.wait() == [1, -signal.SIGTERM]


def test_ctrl_c_leaves_time_to_finish(start: Start) -> None:
    job = start("try:\n    forever()\nfinally:\n    time.sleep(rank)\n    print('finished')")
    for rank in job.wait_for_ranks():
        rank.send_signal(signal.SIGINT)
    assert job.wait() == [-signal.SIGINT, -signal.SIGINT]
    assert job.output("0.log").count("finished") == job.output("1.log").count("finished") == 1
    assert "ends as well" not in job.everything()


def test_ctrl_c_in_one_rank_only_ends_the_others(start: Start) -> None:
    job = start("failure.INTERRUPT_SECONDS = 3\nos.write(1, b'ready')\nforever()")
    ranks = job.wait_for_ranks()
    job.wait_for("ready")
    ranks[0].send_signal(signal.SIGINT)
    assert job.wait() == [-signal.SIGINT, 1]
    assert "Rank 0 (pid" in job.output("1.log")
    assert "KeyboardInterrupt" in job.output("1.log")


@pytest.mark.parametrize("killed", [0, 1])
def test_forked_processes_neither_hide_a_death_nor_speak_for_the_rank(start: Start, killed: int) -> None:
    fork = "if os.fork() == 0: sys.exit()\nos.wait()\n"  # says no goodbye
    fork += "worker = os.fork()\nif worker: print('worker', worker, flush=True)\nforever()"
    job = start(fork)
    ranks = job.wait_for_ranks()
    job.wait_for("worker")
    workers = [psutil.Process(int(line.split()[1])) for line in job.everything().splitlines() if "worker" in line]
    try:
        ranks[killed].kill()
        assert job.wait()[1 - killed] == 1
        assert all(worker.is_running() for worker in workers)
    finally:
        for worker in workers:
            worker.kill()


def test_strangers_alarm_nobody(start: Start) -> None:
    body = "address = failure._member.connection.getpeername()\n"
    body += "for message in (b'', b'GET / HTTP/1.1\\n', b'[]\\n', b'{\"token\": \"0\", \"rank\": 0}\\n'):\n"
    body += "    stranger = __import__('socket').create_connection(address[:2])\n    stranger.sendall(message)\n"
    body += "    stranger.close()\ndist.barrier()\ntime.sleep(1)\n"
    job = start(body)
    assert job.wait(60) == [0, 0]
    assert "fabric_tp" not in job.everything()


def test_torchrun(tmp_path: Path) -> None:
    job = Job(tmp_path, "forever()", 2)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(job.script)]
    job.start("torchrun.log", [sys.executable, *command])
    try:
        ranks = job.wait_for_ranks()
        ranks[1].kill()
        assert job.wait() == [1]
        assert not ranks[0].is_running()
        assert "Rank 1 (pid" in job.everything()
    finally:
        job.stop()


def test_addresses_that_lead_nowhere(start: Start) -> None:
    """0.0.0.1 cannot be connected to: once it comes first, once it is the only one."""
    body = "failure.leave()\nconnection._own_addresses = lambda: iter(['0.0.0.1', '127.0.0.1'])\n"
    body += "failure.watch(rank, world_size)\nassert failure._member is not None\ndist.barrier()\nfailure.leave()\n"
    body += "connection._own_addresses = lambda: iter(['0.0.0.1'])\nfailure.watch(rank, world_size)\n"
    body += "failure.watch(rank, world_size)  # still does nothing\ndist.barrier()"
    job = start(body)
    assert job.wait(60) == [0, 0], job.everything()
    assert "Ranks [0, 1] cannot reach rank 0 at 0.0.0.1, port" in job.output("0.log")


# Before the ranks have met

CHILD = f"""
import os, subprocess, sys, threading, time
{IMPORT}
child = "LOCAL_RANK" in os.environ
if child and "late" in sys.argv:
    main = os.getppid()
    print("rank 1 met as pid", os.getpid(), flush=True)
    while os.getppid() == main:
        time.sleep(0.01)
failure.watch_parent()
if not child:
    subprocess.Popen([sys.executable, *sys.argv], env={{**os.environ, "LOCAL_RANK": "1"}})
    print("rank 0 met as pid", os.getpid(), flush=True)
elif "late" not in sys.argv:
    print("rank 1 met as pid", os.getpid(), flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_child_ends_with_the_process_that_started_it(tmp_path: Path, when: str) -> None:
    job = Job(tmp_path, "", 2)
    job.script.write_text(CHILD)
    job.start("all.log", [sys.executable, str(job.script), when])
    ranks = job.wait_for_ranks()
    try:
        ranks[0].kill()
        assert psutil.wait_procs(ranks, DEADLINE)[1] == []
        assert f"The main process, pid {ranks[0].pid}, has ended before the ranks met" in job.everything()
    finally:
        job.stop()
        for rank in ranks:
            if rank.is_running():
                rank.kill()
