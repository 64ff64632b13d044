"""The time of a step against the bandwidth between the ranks: ``python -m benchmarks.limited_link``, as root on Linux.

Two gloo ranks of one thread each live in network namespaces of their own, with one virtual cable between them that lets
through so many bits a second in each direction (``tc qdisc ... tbf``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.llama import Shape, Step, fabric_tp_step, torch_plan_step
from fabric_tp.measure.communication import CollectiveCounter

WAYS = ("fabric_tp", "fabric_tp, overlap", "torch's styles")
NAMESPACES, CABLE, ADDRESSES, PORT = ("link-0", "link-1"), ("cable-0", "cable-1"), ("10.78.0.1", "10.78.0.2"), "29561"
RANK = "FABRIC_TP_LINK_RANK"
"""Set in the environment of the processes that are the ranks."""


def main(
    *,
    shape: Shape = Shape(layers=4, width=512, heads=8, kv_heads=4, hidden=1408, vocabulary=2048, batch=2, length=512),  # noqa: B008
    mbit: Sequence[int] = (200, 400, 800, 1600),
    rounds: int = 5,
    out: Path | None = None,
) -> None:
    """Time forward and backward: this library with halves that overlap and without, and torch's own styles.

    Args:
        shape: Of the model and the batch.
        mbit: Bandwidths, in millions of bits a second; without a limit comes first.
        rounds: Timed steps of each.
        out: A file for the figures, as JSON.

    Raises:
        ValueError: Network namespaces are not allowed here.
    """
    if RANK in os.environ:
        _serve(int(os.environ[RANK]), shape)
        return
    seconds: dict[int | None, dict[str, float]] = {}
    with _cable(), _ranks(sys.argv[1:]) as ranks:
        sent = [int(_ask(ranks, f"bytes {way}")[0]) for way in WAYS]
        for rate in (None, *mbit):
            _limit(rate)
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for index in range(rounds + 1):
                for way, found in times.items():
                    slowest = max(_ask(ranks, way))
                    found += [slowest] if index else []
            seconds[rate] = {way: median(found) for way, found in times.items()}
    _report(seconds, sent[0], shape)
    if out:
        result = {"setting": asdict(shape), "bytes sent by a rank": dict(zip(WAYS, sent, strict=True))}
        out.write_text(json.dumps({**result, "seconds": {str(rate): found for rate, found in seconds.items()}}) + "\n")


def _report(seconds: dict[int | None, dict[str, float]], sent: int, shape: Shape) -> None:
    compute = seconds[None]["fabric_tp"]
    title = f"Forward and backward on two ranks, {shape.layers} layers of width {shape.width}, ms"
    table = Table(title=title, title_justify="left")
    for heading in ("Mbit/s", "communication alone", "limit", *WAYS, "hidden of what was exposed"):
        table.add_column(heading, justify="right")
    for rate, found in seconds.items():
        communication = 8 * sent / (rate * 1e6) if rate else 0.0
        plain, overlapped = found["fabric_tp"], found["fabric_tp, overlap"]
        hidden = f"{(plain - overlapped) / (plain - compute):.0%}" if plain > 1.05 * compute else ""
        times = (communication, max(compute, communication), *found.values())
        table.add_row(str(rate or "no limit"), *(f"{1000 * each:,.0f}" for each in times), hidden)
    Console(width=130).print(table)


@contextmanager
def _cable() -> Iterator[None]:
    """Two network namespaces and a cable between them."""
    try:
        for namespace in NAMESPACES:
            _run("ip", "netns", "add", namespace)
        ends = [(cable, "netns", namespace) for cable, namespace in zip(CABLE, NAMESPACES, strict=True)]
        _run("ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for namespace, cable, address in zip(NAMESPACES, CABLE, ADDRESSES, strict=True):
            for command in (
                ("addr", "add", f"{address}/24", "dev", cable),
                ("link", "set", "lo", "up"),
                ("link", "set", cable, "up"),
            ):
                _run("ip", "-n", namespace, *command)
        yield
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"Two network namespaces could not be made: {error}. It takes root, and iproute2's ip and tc."
        ) from error
    finally:
        for namespace in NAMESPACES:
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


def _limit(rate: int | None) -> None:
    for namespace, cable in zip(NAMESPACES, CABLE, strict=True):
        if rate is None:
            _run("ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", cable, "root", "pfifo_fast")
        else:
            shaped = ("tbf", "rate", f"{rate}mbit", "burst", "512kb", "latency", "1000ms")
            _run("ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", cable, "root", *shaped)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


Rank = subprocess.Popen[str]


@contextmanager
def _ranks(arguments: Sequence[str]) -> Iterator[list[Rank]]:
    command = [sys.executable, "-m", "benchmarks.limited_link", *arguments]
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", namespace, *command],
            env={**os.environ, RANK: str(rank), "GLOO_SOCKET_IFNAME": CABLE[rank], "TORCH_CPP_LOG_LEVEL": "ERROR"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, namespace in enumerate(NAMESPACES)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


def _ask(ranks: Sequence[Rank], question: str) -> list[float]:
    for rank in ranks:
        assert rank.stdin
        rank.stdin.write(question + "\n")
        rank.stdin.flush()
    return [float(rank.stdout.readline()) for rank in ranks if rank.stdout]


def _serve(rank: int, shape: Shape) -> None:
    """A rank: take the names of ways, and say how long a step took, or how many bytes it sends."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"tcp://{ADDRESSES[0]}:{PORT}", rank=rank, world_size=2)
    names = ("data_parallel", "tensor_parallel")
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=names)
    tensor_parallel = mesh["tensor_parallel"]
    steps: dict[str, Step] = {
        "fabric_tp": fabric_tp_step(shape, False, tensor_parallel),
        "fabric_tp, overlap": fabric_tp_step(shape, False, tensor_parallel, overlap=True),
        "torch's styles": torch_plan_step(shape, False, tensor_parallel),
    }
    for question in sys.stdin:
        way = question.strip()
        if way.startswith("bytes "):
            with CollectiveCounter(mesh) as counter:
                steps[way.removeprefix("bytes ")]()
            print(sum(each.sent for each in counter.collectives), flush=True)
            continue
        start = time.perf_counter()
        steps[way]()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    auto_cli(main)
