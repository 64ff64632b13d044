"""Setting up one rank of very many: ``python -m benchmarks.scale``.

A process plays one rank under the fake process group, with 8 tensor-parallel ranks and FSDP2 over the others: it makes
the mesh, parallelizes a model and plans its part of a checkpoint, and measures what each takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from litgpt import GPT
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

import fabric_tp
from benchmarks.llama import Shape, litgpt_config

TENSOR_PARALLEL = 8
STAGES = ("mesh", "model", "checkpoint's plan")
PLACES = {"first": 0.0, "middle": 0.5, "last": 1.0}


def main(
    *,
    ranks: Sequence[int] = (8, 64, 1024, 4096),
    layers: int = 16,
    out: Path | None = None,
    play: tuple[int, int] | None = None,
) -> None:
    """Seconds and MB of setting up the first rank, one in the middle and the last.

    Args:
        ranks: Numbers of ranks, multiples of 8.
        layers: Of the model, 512 wide.
        out: A file for the figures, as JSON.
        play: A rank, and of how many, for a process that this command starts.
    """
    if play:
        print(json.dumps(_play(*play, layers)))
        return
    found: dict[str, dict[str, float]] = {}
    table = Table(
        title=f"Setting up a rank: {layers} layers of width 512, 8 tensor-parallel ranks", title_justify="left"
    )
    for heading in ("ranks", "which", *(f"{stage}, s" for stage in STAGES), "MB"):
        table.add_column(heading, justify="left" if heading == "which" else "right")
    for size in ranks:
        for name, place in PLACES.items():
            rank = round(place * (size - 1))
            arguments = ["--layers", str(layers), "--play", f"[{rank}, {size}]"]
            command = [sys.executable, "-m", "benchmarks.scale", *arguments]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures = found[f"{name} of {size}"] = json.loads(output.splitlines()[-1])
            table.add_row(str(size), name, *(f"{figures[stage]:.2f}" for stage in STAGES), f"{figures['MB']:.0f}")
    Console(width=100).print(table)
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n")


def _play(rank: int, size: int, layers: int) -> dict[str, float]:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    process = psutil.Process()
    shape = Shape(layers=layers, width=512, heads=8, kv_heads=8, hidden=1408, vocabulary=4096)
    before, times = process.memory_info().rss, [time.perf_counter()]
    dist.init_process_group("fake", rank=rank, world_size=size)
    names = ("data_parallel", "tensor_parallel")
    mesh = init_device_mesh("cpu", (size // TENSOR_PARALLEL, TENSOR_PARALLEL), mesh_dim_names=names)
    times.append(time.perf_counter())
    with torch.device("meta"):
        model = GPT(litgpt_config(shape, block_size=128))
    model = fabric_tp.litgpt()(model, mesh)
    times.append(time.perf_counter())
    planner = DefaultSavePlanner()
    planner.set_up_planner(get_model_state_dict(model), is_coordinator=rank == 0)
    planner.create_local_plan()
    times.append(time.perf_counter())
    used = (process.memory_info().rss - before) / 1e6
    dist.destroy_process_group()
    seconds = (end - start for start, end in pairwise(times))
    return {**dict(zip(STAGES, seconds, strict=True)), "MB": used}


if __name__ == "__main__":
    auto_cli(main)
