"""A rank that dies takes the others with it, in time and with the cause."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import psutil
import pytest

from tests.programs import python, torchrun
from tests.strategy.jobs import DEADLINE, Job, Start

WAYS_TO_HANG = {
    "event": "forever()",
    "recv from a living rank": "forever() if rank == 2 else dist.recv(torch.zeros(1), src=2)",
}


@pytest.mark.swept(lambda p: p["hang"] == "event")
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


@pytest.mark.swept(lambda p: p["failing"] == 1)
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


@pytest.mark.swept(lambda p: p["how"] == "sys.exit(0)")
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


def test_torchrun(tmp_path: Path) -> None:
    """Which ends the other rank as well, and on a busy machine may do so before that has said why."""
    assert any("Rank 1 (pid" in killed_under_torchrun(tmp_path / str(attempt)) for attempt in range(3))


def killed_under_torchrun(folder: Path) -> str:
    folder.mkdir()
    job = Job(folder, "forever()", 2)
    job.start("torchrun.log", [*torchrun(2), str(job.script)])
    try:
        ranks = job.wait_for_ranks()
        ranks[1].kill()
        assert job.wait() == [1]
        assert not ranks[0].is_running()
        return job.everything()
    finally:
        job.stop()


CHILD = """
import os, sys, threading, time
from fabric_tp.strategy import failure

failure.watch_parent()
main, late = os.getpid(), "late" in sys.argv
if os.fork():
    print("rank 0 met as pid", main, flush=True)
else:
    os.environ["LOCAL_RANK"] = "1"
    if late:
        print("rank 1 met as pid", os.getpid(), flush=True)
    while late and os.getppid() == main:
        time.sleep(0.01)
    failure.watch_parent()
    if not late:
        print("rank 1 met as pid", os.getpid(), flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_child_ends_with_the_process_that_started_it(tmp_path: Path, when: str) -> None:
    job = Job(tmp_path, "", 2)
    job.script.write_text(CHILD)
    job.start("all.log", [*python(), str(job.script), when])
    ranks = job.wait_for_ranks()
    try:
        ranks[0].kill()
        assert job.wait() == [-signal.SIGKILL]
        assert psutil.wait_procs(ranks, DEADLINE)[1] == []
        assert f"The main process, pid {ranks[0].pid}, has ended before the ranks met" in job.everything()
    finally:
        job.stop()
        for rank in ranks:
            if rank.is_running():
                rank.kill()
