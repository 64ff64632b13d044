"""Starts programs as users do, except that most are forks of a process that has imported what takes seconds."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

HERE = Path(__file__).parent
TESTS = HERE.parent
ROOT = TESTS.parent
RECIPES = ROOT / "recipes"
BIN = Path(sys.executable).parent
SECONDS = 600


@dataclass(frozen=True)
class Program:
    """A running fork: the leader of a session of its own, whose output goes to a file."""

    pid: int
    output: Path

    def poll(self) -> int | None:
        return ask(poll=self.pid)

    def wait(self, seconds: float = SECONDS) -> int:
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"still runs after {seconds} seconds\n{self.output.read_text()}")
            time.sleep(0.05)
        return code

    def wait_for(self, text: str, seconds: float = SECONDS) -> None:
        """Until its output has it."""
        end = time.monotonic() + seconds
        while text not in self.output.read_text():
            if self.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"no {text!r} in its output\n{self.output.read_text()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """With all that it has started."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            for each in [*process.children(recursive=True), process]:
                each.kill()


def start(command: list[str], output: Path, *, host: dict[str, str] | None = None, **more: str) -> Program:
    """Start a program.

    Args:
        command: ``python`` or the name of a console script, and its arguments.
        output: Where its stdout and stderr are appended.
        host: The network ``namespace`` that it runs in, and the ``name`` of the machine that it sees.
        more: For its environment.
    """
    output.touch()  # it may be read before the fork has opened it
    return Program(ask(command=command, output=str(output), environment=environment(**more), host=host), output)


def ask(**request: Any) -> Any:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@cache
def _server() -> subprocess.Popen:
    """Ends with this process, as its stdin does."""
    command = [sys.executable, str(HERE / "server.py")]
    return subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def environment(**more: str) -> dict[str, str]:
    """Without what a launcher around the tests may have set, and without GPUs. More threads only help large models."""
    launchers = ("LT_", "PL_", "SLURM_", "TORCHELASTIC_", "MASTER_", "FABRIC_TP_")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")
    env = {name: value for name, value in os.environ.items() if not name.startswith((*launchers, *ranks))}
    paths = [ROOT, TESTS / "without_extras", TESTS / "recipes"]  # the last has a data module for the recipe
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**env, "PYTHONPATH": os.pathsep.join(map(str, paths)), **more}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def python() -> list[str]:
    return ["python"]


def fabric_run(devices: int) -> list[str]:
    return ["fabric", "run", "--accelerator", "cpu", "--devices", str(devices), "--main-port", free_port()]


def torchrun(processes: int) -> list[str]:
    return ["torchrun", "--standalone", "--nproc_per_node", str(processes)]


def llama3(launcher: list[str], arguments: Iterable[object], recipe: str = "llama3") -> list[str]:
    return [*launcher, str(RECIPES / f"{recipe}.py"), *map(str, arguments)]


def run(launcher: list[str], arguments: Iterable[object], recipe: str = "llama3") -> str:
    """What the recipe prints when it is started so."""
    with TemporaryDirectory() as folder:
        return finish([start(llama3(launcher, arguments, recipe), Path(folder) / "output")])


def run_ranks(size: int, arguments: Iterable[object], recipe: str = "llama3") -> str:
    """The same with processes that are there already, as those of torchrun find themselves."""
    with TemporaryDirectory() as folder:
        return finish(start_ranks(size, arguments, Path(folder) / "output", recipe))


def start_ranks(
    size: int, arguments: Iterable[object], output: Path, recipe: str = "llama3", *, within: Iterable[str] = ()
) -> list[Program]:
    """``within`` is a program that runs the recipe, and what it is given before it."""
    same = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    same |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "test"}
    command = llama3([*python(), *within], arguments, recipe)
    return [start(command, output, **same, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)]


def finish(programs: list[Program]) -> str:
    """Their common output, once all have ended well."""
    codes = [program.wait() for program in programs]
    output = programs[0].output.read_text()
    assert codes == [0] * len(programs), output
    return output
