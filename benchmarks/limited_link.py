"""The time of a step against the bandwidth between the ranks: ``python -m benchmarks.limited_link``.

As root on Linux, two gloo ranks of one thread each live in network namespaces of their own, with one virtual cable
between them that lets through so many bits a second in each direction (``tc qdisc ... tbf``). Elsewhere, and with
``--imitated true``, ranks sleep as long as the bytes would take; the table says which it was. The model is litgpt's;
under the other plans it is one of the same shape.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from litgpt import GPT
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh

import fabric_tp
from benchmarks.llama import (
    Shape,
    Step,
    litgpt_config,
    litgpt_step,
    save_transformers,
    torch_plan_step,
    transformers_step,
)
from benchmarks.plot import plot_limited_link
from benchmarks.slow_link import slow_link
from fabric_tp.measure.calibration import measure_rank, with_bandwidth
from fabric_tp.measure.communication import CollectiveCounter
from fabric_tp.measure.hardware import Hardware, parse_hardware
from fabric_tp.measure.operations import Event
from fabric_tp.measure.schedule import schedule
from fabric_tp.measure.step import count_step
from fabric_tp.mesh import fake_mesh, fake_tensors

PLAIN, OVERLAP = "fabric_tp", "fabric_tp, overlap"
OPTIONS: dict[str, dict[str, Any]] = {PLAIN: {}, OVERLAP: {"overlap": True}}
WAYS = (PLAIN, OVERLAP, "torch's styles", "Transformers")
NAMESPACES, CABLE, ADDRESSES, PORT = ("link-0", "link-1"), ("cable-0", "cable-1"), ("10.78.0.1", "10.78.0.2"), "29561"
RANK, ADDRESS, FOLDER = "FABRIC_TP_LINK_RANK", "FABRIC_TP_LINK_ADDRESS", "FABRIC_TP_LINK_FOLDER"
"""Set in the environment of the processes that are the ranks."""

Seconds = dict[int | None, dict[str, float]]
"""By bandwidth in Mbit/s, None without a limit, and way."""


def main(
    *,
    shape: Shape = Shape(layers=4, width=512, heads=8, kv_heads=4, hidden=1408, vocabulary=2048, batch=2, length=512),  # noqa: B008
    mbit: Sequence[int] = (500, 1000, 2000, 4000),
    rounds: int = 5,
    imitated: bool = False,
    out: Path | None = None,
) -> None:
    """Time forward and backward: this library with halves that overlap and without, and other plans.

    Args:
        shape: Of the model and the batch.
        mbit: Bandwidths, in millions of bits a second; without a limit comes first.
        rounds: Timed steps of each.
        imitated: Sleep instead of limiting a cable.
        out: A file for the figures, as JSON; the plot goes beside it.
    """
    if RANK in os.environ:
        _serve(int(os.environ[RANK]), shape)
        return
    imitated = imitated or not _namespaces_are_allowed()
    seconds: Seconds = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_transformers(shape, folder)
        if not imitated:
            stack.enter_context(_cable())
        ranks = stack.enter_context(_ranks(sys.argv[1:], folder, imitated))
        sent = {way: int(_ask(ranks, f"bytes {way}")[0]) for way in WAYS}
        hardware = parse_hardware(_ask(ranks, "hardware")[0])
        for rate in (None, *mbit):
            _ask(ranks, f"rate {rate or 0}") if imitated else _limit(rate)
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for index in range(rounds + 1):
                for way, found in times.items():
                    slowest = max(map(float, _ask(ranks, way)))
                    found += [slowest] if index else []
            seconds[rate] = {way: median(found) for way, found in times.items()}
    predicted = _predict(shape, hardware, list(seconds))
    how = "imitated by sleeping" if imitated else "a virtual cable"
    _report(seconds, predicted, sent[PLAIN], shape, how)
    if out:
        figures = {"setting": asdict(shape), "link": how, "bytes sent by a rank": sent, "hardware": asdict(hardware)}
        figures |= {"seconds": _by_name(seconds), "predicted": _by_name(predicted)}
        out.write_text(json.dumps(figures, indent=1) + "\n")
        plot_limited_link(seconds, {rate: 8 * sent[PLAIN] / rate / 1e6 for rate in mbit}, out.with_suffix(".png"))


def _report(seconds: Seconds, predicted: Seconds, sent: int, shape: Shape, how: str) -> None:
    compute = seconds[None][PLAIN]
    title = f"Forward and backward on two ranks, {shape.layers} layers of width {shape.width}, link: {how}; ms"
    table = Table(title=title, title_justify="left")
    for heading in ("Mbit/s", "communication", "limit", *WAYS, "hidden", *(f"predicted, {way}" for way in OPTIONS)):
        table.add_column(heading, justify="right")
    for rate, found in seconds.items():
        communication = 8 * sent / (rate * 1e6) if rate else 0.0
        exposed = found[PLAIN] - compute
        hidden = f"{(found[PLAIN] - found[OVERLAP]) / exposed:.0%}" if exposed > 0.05 * compute else ""
        times = (communication, max(compute, communication), *found.values())
        guesses = [f"{1000 * each:,.0f} ({each / found[way] - 1:+.0%})" for way, each in predicted[rate].items()]
        table.add_row(str(rate or "no limit"), *(f"{1000 * each:,.0f}" for each in times), hidden, *guesses)
    Console(width=150).print(table)


def _by_name(seconds: Seconds) -> dict[str, dict[str, float]]:
    return {str(rate or "no limit"): found for rate, found in seconds.items()}


def _predict(shape: Shape, hardware: Hardware, rates: Sequence[int | None]) -> Seconds:
    """From what the ranks could do alone and without a limit, and from the events of a step."""
    events = {way: _events(shape, way) for way in OPTIONS}
    found: Seconds = {}
    for rate in rates:
        here = with_bandwidth(hardware, rate * 1e6 / 8) if rate else hardware
        found[rate] = {way: schedule(each, here, {}).seconds for way, each in events.items()}
    return found


def _events(shape: Shape, way: str) -> list[Event]:
    """Of forward and backward; those of clipping and of the optimizer are left out."""
    with fake_mesh(1, 2) as mesh, fake_tensors():
        model = fabric_tp.litgpt(**OPTIONS[way])(GPT(litgpt_config(shape, block_size=shape.length)), mesh)
        tokens, targets = (torch.zeros((shape.batch, shape.length), dtype=torch.int64) for _ in range(2))
        step = count_step(
            model,
            torch.optim.AdamW(model.parameters(), fused=True),
            lambda: model(tokens),
            lambda logits: fabric_tp.cross_entropy(logits, targets),
            mesh=mesh,
        )
    end = next(index for index, event in enumerate(step.events) if getattr(event, "phase", "") == "clipping")
    return list(step.events[:end])


def _namespaces_are_allowed() -> bool:
    try:
        with _cable():
            return True
    except (FileNotFoundError, subprocess.CalledProcessError):
        return False


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
    finally:
        for namespace in NAMESPACES:
            _try("ip", "netns", "del", namespace)


def _limit(rate: int | None) -> None:
    for namespace, cable in zip(NAMESPACES, CABLE, strict=True):
        if rate is None:
            _run("ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", cable, "root", "pfifo_fast")
        else:
            shaped = ("tbf", "rate", f"{rate}mbit", "burst", "512kb", "latency", "1000ms")
            _run("ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", cable, "root", *shaped)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _try(*command: str) -> None:
    with suppress(FileNotFoundError, subprocess.CalledProcessError):
        _run(*command)


Rank = subprocess.Popen[str]


@contextmanager
def _ranks(arguments: Sequence[str], folder: Path, imitated: bool) -> Iterator[list[Rank]]:
    command = [sys.executable, "-m", "benchmarks.limited_link", *arguments]
    address = "127.0.0.1" if imitated else ADDRESSES[0]
    ranks = []
    for rank, namespace in enumerate(NAMESPACES):
        given = {RANK: str(rank), ADDRESS: address, FOLDER: str(folder), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        given |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "RANK": str(rank)}  # Transformers looks for them
        where = [] if imitated else ["ip", "netns", "exec", namespace]
        given |= {} if imitated else {"GLOO_SOCKET_IFNAME": CABLE[rank]}
        pipe = subprocess.PIPE
        ranks.append(
            subprocess.Popen([*where, *command], env={**os.environ, **given}, stdin=pipe, stdout=pipe, text=True)
        )
    try:
        yield ranks
    finally:
        for each in ranks:
            each.kill()


def _ask(ranks: Sequence[Rank], question: str) -> list[str]:
    for rank in ranks:
        assert rank.stdin
        rank.stdin.write(question + "\n")
        rank.stdin.flush()
    return [rank.stdout.readline() for rank in ranks if rank.stdout]


def _serve(rank: int, shape: Shape) -> None:
    """A rank: take the names of ways, and say how long a step took, or how many bytes it sends."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"tcp://{os.environ[ADDRESS]}:{PORT}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    ranks = mesh["tensor_parallel"]
    steps: dict[str, Step] = {way: litgpt_step(shape, False, ranks, **OPTIONS[way]) for way in OPTIONS}
    steps["torch's styles"] = torch_plan_step(shape, False, ranks)
    steps["Transformers"] = transformers_step(shape, False, ranks, Path(os.environ[FOLDER]))
    bandwidth = 0.0
    for question in map(str.strip, sys.stdin):
        word, _, rest = question.partition(" ")
        if word == "bytes":
            with CollectiveCounter(mesh) as counter:
                steps[rest]()
            answer = str(sum(each.sent for each in counter.collectives))
        elif word == "hardware":
            found = replace(measure_rank(torch.device("cpu")), name="a rank of two")
            answer = json.dumps(asdict(found))
        elif word == "rate":
            bandwidth, answer = int(rest) * 1e6 / 8, ""
        else:
            with ExitStack() as stack:
                for context in slow_link(mesh, bandwidth) if bandwidth else ():
                    stack.enter_context(context)
                answer = str(_time(steps[question]))
        print(answer, flush=True)


def _time(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    auto_cli(main)
