"""What tensor parallelism costs the CPU: one rank's step with free collectives.

``python -m benchmarks.dispatch`` runs rank 0 of 4 under the fake process group, so that nothing is sent and nothing is
waited for. On a GPU the host must issue a layer's kernels faster than the GPU runs them; this is the time it takes.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.llama import Shape, fabric_tp_step, one_device_step, torch_plan_step
from benchmarks.report import report


def main(
    *,
    shape: Shape = Shape(width=64, heads=8, kv_heads=4, hidden=192, vocabulary=512, length=32),  # noqa: B008
    tensor_parallel_size: int = 4,
    whole: bool = True,
    rounds: int = 60,
    out: Path | None = None,
) -> None:
    """Time a step: this library, torch's own styles, and one device, one after the other.

    Args:
        shape: Of the model and the batch; small, so that the CPU's cost of each operation dominates.
        tensor_parallel_size: Ranks that there seem to be.
        whole: The step with clipping and AdamW, and not only forward, loss and backward.
        rounds: Timed steps of each.
        out: A file for the figures, as JSON.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("fake", rank=0, world_size=tensor_parallel_size)
    names = ("data_parallel", "tensor_parallel")
    mesh = init_device_mesh("cpu", (1, tensor_parallel_size), mesh_dim_names=names)["tensor_parallel"]
    steps = {
        "fabric_tp": fabric_tp_step(shape, whole, mesh),
        "torch's styles": torch_plan_step(shape, whole, mesh),
        "one device": one_device_step(shape, whole),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 5):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if index >= 5:
                seconds[name].append(time.perf_counter() - start)
    what = "A whole step" if whole else "Forward and backward"
    title = f"{what} on the CPU, {shape.layers} layers, rank 0 of {tensor_parallel_size}, free collectives"
    report(title, seconds, peer="torch's styles", setting=asdict(shape), out=out)
    dist.destroy_process_group()


if __name__ == "__main__":
    auto_cli(main)
