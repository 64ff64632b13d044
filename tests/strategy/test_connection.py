"""The connections by which ranks learn of each other's end."""

from __future__ import annotations

import psutil
import pytest

from tests.strategy.jobs import Start


@pytest.mark.swept(lambda p: p["killed"] == 1)
@pytest.mark.parametrize("killed", [0, 1])
def test_forked_processes_neither_hide_a_death_nor_speak_for_the_rank(start: Start, killed: int) -> None:
    fork = "if os.fork() == 0:\n    atexit._run_exitfuncs()\n    os._exit(0)\nos.wait()\n"  # says no goodbye
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


def test_addresses_that_lead_nowhere(start: Start) -> None:
    """0.0.0.1 cannot be connected to: once it comes first, once it is the only one."""
    body = "failure.leave()\nconnection._own_addresses = lambda: iter(['0.0.0.1', '127.0.0.1'])\n"
    body += "failure.watch(rank, world_size)\nassert failure._member is not None\ndist.barrier()\nfailure.leave()\n"
    body += "connection._own_addresses = lambda: iter(['0.0.0.1'])\nfailure.watch(rank, world_size)\n"
    body += "failure.watch(rank, world_size)  # still does nothing\ndist.barrier()"
    job = start(body)
    assert job.wait(60) == [0, 0], job.everything()
    assert "Ranks [0, 1] cannot reach rank 0 at 0.0.0.1, port" in job.output("0.log")
