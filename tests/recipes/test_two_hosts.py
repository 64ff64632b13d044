"""The recipe on two hosts: network namespaces with names of their own, joined by a virtual cable.

They share their file system, as machines of a cluster do, and so `out_dir` and the cache of the data.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from tests.programs import RECIPES, Program, fabric_run
from tests.programs import start as start_program

from .runs import STEPS, losses, options
from .test_failure import DEADLINE, FOREVER, rank_process, runs, wait_until

ADDRESSES = ["10.79.0.1", "10.79.0.2"]

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="network namespaces need root and ip (iproute2)",
)


class Host:
    """What runs on it has its own network, with the other host as the only one to reach, and its own name."""

    def __init__(self, index: int) -> None:
        self.index, self.name = index, f"host{index}"
        self.namespace, self.interface = f"fabric-tp-{os.getpid()}-{index}", f"tp{os.getpid() % 10**8}-{index}"

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self.namespace, *arguments], check=True, capture_output=True)

    def start(self, command: list[str], log: Path) -> Program:
        host = {"namespace": self.namespace, "name": self.name}
        return start_program(command, log, host=host, GLOO_SOCKET_IFNAME=self.interface)

    def fabric_run(self) -> list[str]:
        main = ["--main-address", ADDRESSES[0], "--main-port", "29400"]
        nodes = ["--num-nodes", "2", "--node-rank", str(self.index)]
        return ["fabric", "run", "--accelerator", "cpu", "--devices", "2", *nodes, *main]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    both = [Host(0), Host(1)]
    try:
        for host in both:
            subprocess.run(["ip", "netns", "add", host.namespace], check=True)
        ends = [[host.interface, "netns", host.namespace] for host in both]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]], check=True)
        for host, address in zip(both, ADDRESSES, strict=True):
            host.ip("addr", "add", f"{address}/24", "dev", host.interface)
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", host.interface, "up")
        yield both
    finally:
        for host in both:
            subprocess.run(["ip", "netns", "del", host.namespace], check=False, capture_output=True)


@pytest.fixture
def start(hosts: list[Host], tmp_path: Path) -> Iterator[Callable[[list[str]], list[Program]]]:
    """``start(arguments)`` starts `fabric run` with them on both hosts; their outputs go to "0.log" and "1.log"."""
    started: list[Program] = []

    def start(arguments: list[str]) -> list[Program]:
        for host in hosts:
            started.append(host.start([*host.fabric_run(), *arguments], tmp_path / f"{host.index}.log"))
        return started

    yield start
    for process in started:
        process.kill()


SIZES = ("--data_parallel_size", 2, "--tensor_parallel_size", 2)


def logs(folder: Path) -> str:
    return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(folder.glob("?.log")))


TELL_GROUPS_AND_TRAIN = """
import runpy, socket, sys
import torch.distributed as dist
import fabric_tp

launch = fabric_tp.launch

def launch_and_tell(*args, **kwargs):
    fabric = launch(*args, **kwargs)
    groups = {name: [None, None] for name in ("tensor_parallel", "data_parallel")}
    for name, hosts in groups.items():
        dist.all_gather_object(hosts, socket.gethostname(), fabric.strategy.device_mesh.get_group(name))
    print("groups", fabric.global_rank, *groups["tensor_parallel"], *groups["data_parallel"], flush=True)
    return fabric

fabric_tp.launch = launch_and_tell
sys.argv = sys.argv[1:]
sys.path.insert(0, RECIPES)
runpy.run_path(sys.argv[0], run_name="__main__")
""".replace("RECIPES", repr(str(RECIPES)))


@pytest.mark.sweep
def test_losses_are_those_of_one_host_and_tensor_parallel_groups_stay_inside_a_host(
    start: Callable, folder: Path, tmp_path: Path, run_2x2: Path
) -> None:
    script = tmp_path / "tell_groups_and_train.py"
    script.write_text(TELL_GROUPS_AND_TRAIN)
    out_dir = folder / "two-hosts"
    for process in start([str(script), str(RECIPES / "llama3.py"), *options(out_dir, *SIZES)]):
        assert process.wait() == 0, logs(tmp_path)
    assert "2 x 2 processes (data x tensor parallel, cpu)" in (tmp_path / "0.log").read_text()
    assert len(losses(out_dir)) == STEPS
    torch.testing.assert_close(losses(out_dir), losses(run_2x2), rtol=1e-6, atol=0)
    assert (out_dir / "final" / "lit_model.pth").is_file()
    found = {line for line in logs(tmp_path).splitlines() if line.startswith("groups")}
    both = "host0 host1"
    assert found == {
        *(f"groups 0 host0 host0 {both}", f"groups 1 host0 host0 {both}"),
        *(f"groups 2 host1 host1 {both}", f"groups 3 host1 host1 {both}"),
    }, logs(tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("what", ["rank", "cable"])
def test_what_happens_on_one_host_ends_both(
    start: Callable, hosts: list[Host], folder: Path, tmp_path: Path, what: str, request: pytest.FixtureRequest
) -> None:
    started = start([str(RECIPES / "llama3.py"), *options(folder / f"lost-{what}", *SIZES, *FOREVER)])
    main_log = tmp_path / "0.log"
    wait_until(lambda: "step 3/" in main_log.read_text() or started[0].poll() is not None, 400, main_log)
    assert [process.poll() for process in started] == [None, None], logs(tmp_path)
    roots = [psutil.Process(process.pid) for process in started]
    tree = [each for root in roots for each in [root, *root.children(recursive=True)]]
    assert len(tree) >= 6
    if what == "rank":
        victim = rank_process(roots[1], 1, fabric_run)
        victim.kill()
        cause, seconds = f"Rank 3 (pid {victim.pid} on host1) was lost without a traceback", DEADLINE
    else:
        request.addfinalizer(lambda: hosts[1].ip("link", "set", hosts[1].interface, "up"))
        hosts[1].ip("link", "set", hosts[1].interface, "down")
        cause, seconds = "on host1) was lost: its machine, or the network to it, does not answer", 2 * DEADLINE
    wait_until(lambda: not any(map(runs, tree)), seconds, main_log)
    assert 0 not in [process.wait(5) for process in started]
    assert cause in main_log.read_text()
