from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import free_port, python
from tests.strategy.jobs import Job, Start


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(body, size)``: processes that nobody watches over, with an output for each: "0.log", "1.log", ..."""
    jobs = []

    def start(body: str, size: int = 2) -> Job:
        jobs.append(job := Job(tmp_path, body, size))
        port = free_port()
        for rank in map(str, range(size)):
            env = {"RANK": rank, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            job.start(f"{rank}.log", [*python(), str(job.script)], **env)
        return job

    yield start
    for job in jobs:
        job.stop()
