"""What one card shows: ``python -m benchmarks.gpu``, in a few minutes. It has not been run on one yet.

One rank of eight computes its step of Llama-3-8B's shapes on real tensors, with collectives that go nowhere (torch's
fake process group): its time against an eighth of the whole model's, where the time goes, its memory against the
estimate's. And two ranks that share the card, over gloo, compute what one does. ``--device cpu`` does the same with a
small model, for those who change this file.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fabric_tp.optimizer import local
from jsonargparse import auto_cli
from litgpt import GPT, Config
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import profile

import fabric_tp
from fabric_tp.architectures.litgpt.config import yardstick
from fabric_tp.measure import Hardware, estimate, predict
from fabric_tp.measure.calibration import measure_rank
from fabric_tp.measure.step import default_dtype
from fabric_tp.mesh import fake_mesh
from fabric_tp.shards import gather_shards

Device = Literal["cuda", "cpu"]
TENSOR_PARALLEL = 8
ROUNDS = 5
KINDS = {
    "products": re.compile(r"gemm|matmul|cutlass|xmma|nvjet|aten::(mm|addmm|bmm)", re.IGNORECASE),
    "attention": re.compile(r"flash|fmha|cudnn.*attention|scaled_dot_product", re.IGNORECASE),
    "norms": re.compile(r"norm", re.IGNORECASE),
    "loss": re.compile(r"softmax|nll|cross_entropy", re.IGNORECASE),
}
"""Of kernels, by their names."""


def main(*, device: Device = "cuda", layers: int = 8, out: Path | None = None) -> None:
    """Run all of it and print its tables.

    Args:
        device: "cpu" for a trial of this file.
        layers: Blocks of the model.
        out: A file for the figures, as JSON.

    Raises:
        ValueError: There is no such device.
    """
    warnings.filterwarnings("ignore")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no GPU here; --device cpu tries this file out on a small model.")
    hardware = measure_rank(torch.device(device))
    config = replace(yardstick(device), n_layer=layers)
    figures: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for compiled in (False, True):
            figures += [measured(config, hardware, device, dtype, compiled, size) for size in (1, TENSOR_PARALLEL)]
    console = Console(width=140)
    console.print(_times(figures, hardware))
    console.print(_kernels(figures))
    differences = shared_card(device)
    console.print("Two ranks that share the device, over gloo, against one; largest relative differences:")
    for way, worst in differences.items():
        console.print(f"{way}: loss {worst['loss']:.1e}, gradients {worst['gradients']:.1e}")
    if out:
        out.write_text(json.dumps({"hardware": hardware.name, "steps": figures, "parity": differences}, indent=1))


def measured(
    config: Config, hardware: Hardware, device: Device, dtype: torch.dtype, compiled: bool, size: int
) -> dict[str, Any]:
    """One rank's step: milliseconds and GiB, beside what was said before; kernels by kind."""
    options: dict[str, Any] = {"compile": compiled, "fused_loss": True}
    precision: Any = "bf16-true" if dtype == torch.bfloat16 else "32-true"
    said = estimate(config, fabric_tp.litgpt(**options), tensor_parallel_size=size, precision=precision)
    with fake_mesh(1, size, device) as mesh:
        step = _step(config, device, dtype, lambda model: fabric_tp.litgpt(**options)(model, mesh))
        for _ in range(2):  # the optimizer's state, and the compiler
            step()
        _reset(device)
        seconds = median(_seconds(step, device) for _ in range(ROUNDS))
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
        kernels = _profiled(step)
        del step
    torch.compiler.reset()
    return {
        "dtype": precision,
        "compile": compiled,
        "ranks": size,
        "ms": 1000 * seconds,
        "predicted ms": 1000 * predict(said, hardware).seconds,
        "GiB": peak,
        "estimated GiB": said.memory.peak / 2**30,
        "kernels": kernels,
    }


def _step(
    config: Config, device: Device, dtype: torch.dtype, parallelize: Callable[[nn.Module], nn.Module]
) -> Callable[[], None]:
    with torch.device(device), default_dtype(dtype):
        model = GPT(config)
        tokens = torch.zeros((1, config.block_size + 1), dtype=torch.int64)
    model = parallelize(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def run() -> None:
        loss = fabric_tp.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with local(optimizer):
            optimizer.step()
        optimizer.zero_grad()

    return run


def _reset(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _seconds(run: Callable[[], None], device: Device) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _profiled(run: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of kernels by kind, of the gaps between them, and the names of those of attention."""
    with profile() as profiler:
        run()
    events = list(profiler.events() or ())
    on_device = [each for each in events if each.device_type == DeviceType.CUDA]
    found: dict[str, Any] = dict.fromkeys((*KINDS, "other"), 0.0)
    names = set()
    for each in on_device or events:
        took = each.device_time if on_device else each.self_cpu_time_total
        kind = next((kind for kind, pattern in KINDS.items() if pattern.search(each.name)), "other")
        found[kind] += took / 1000
        names |= {each.name[:60]} if kind == "attention" else set()
    spans = [(each.time_range.start, each.time_range.end) for each in on_device]
    whole = (max(end for _, end in spans) - min(start for start, _ in spans)) / 1000 if spans else 0.0
    found["gaps"] = max(0.0, whole - sum(found.values()))
    return {**found, "attention kernels": sorted(names)}


WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "overlap": {"overlap": True},
    "asynchronous, by symmetric memory": {"overlap": True, "compile": True},
}


def shared_card(device: Device) -> dict[str, dict[str, float]]:
    """Loss and gradients of two ranks on one device against those of one, relative to each one's largest value."""
    file = Path(tempfile.mkdtemp()) / "found.json"
    mp.spawn(_share, (str(file), device), nprocs=2)
    return json.loads(file.read_text())


def _share(rank: int, file: str, device: Device) -> None:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=2)
    mesh = init_device_mesh(device, (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    one = _loss_and_gradients(device, lambda model: model)
    found: dict[str, dict[str, float]] = {}
    for way, options in WAYS.items():
        two = _loss_and_gradients(device, partial(fabric_tp.litgpt(**options), device_mesh=mesh))
        worst = {name: float((one[name] - two[name]).abs().max() / one[name].abs().max()) for name in one}
        found[way] = {"loss": worst.pop("loss"), "gradients": max(worst.values())}
    if rank == 0:
        Path(file).write_text(json.dumps(found))
    dist.destroy_process_group()


def _loss_and_gradients(device: Device, parallelize: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    config = replace(yardstick("cpu"), n_layer=2)
    tokens = torch.randint(config.padded_vocab_size, (2, 65), generator=torch.Generator().manual_seed(1)).to(device)
    torch.manual_seed(0)
    model: nn.Module = GPT(config).to(device)
    names = [name for name, _ in model.named_parameters() if "qkv" not in name]
    model = parallelize(model)
    loss = fabric_tp.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if name in names}
    whole = {name: gather_shards(grad) for name, grad in gradients.items() if grad is not None}
    return {"loss": loss.detach(), **whole}


def _times(figures: list[dict[str, Any]], hardware: Hardware) -> Table:
    table = Table(title=f"A step of one rank on {hardware.name}, without collectives", title_justify="left")
    for heading in ("precision", "compile", "ranks", "ms", "of one rank / t", "predicted ms", "GiB", "estimated GiB"):
        table.add_column(heading, justify="right")
    for each in figures:
        alone = next(other for other in figures if _setting(other) == (*_setting(each)[:2], 1))
        share = each["ms"] * each["ranks"] / alone["ms"]
        peak = "" if each["GiB"] is None else f"{each['GiB']:.2f}"
        ms, guess = (f"{each[name]:.1f}" for name in ("ms", "predicted ms"))
        estimated = f"{each['estimated GiB']:.2f}"
        table.add_row(
            each["dtype"], str(each["compile"]), str(each["ranks"]), ms, f"{share:.2f}", guess, peak, estimated
        )
    return table


def _setting(each: dict[str, Any]) -> tuple[Any, ...]:
    return each["dtype"], each["compile"], each["ranks"]


def _kernels(figures: list[dict[str, Any]]) -> Table:
    table = Table(title="Kernels, ms", title_justify="left")
    names = [name for name in figures[0]["kernels"] if name != "attention kernels"]
    for heading in ("precision", "compile", "ranks", *names, "attention by"):
        table.add_column(heading, justify="right")
    for each in figures:
        times = [f"{each['kernels'][name]:.1f}" for name in names]
        attention = "\n".join(each["kernels"]["attention kernels"])
        table.add_row(each["dtype"], str(each["compile"]), str(each["ranks"]), *times, attention)
    return table


if __name__ == "__main__":
    auto_cli(main)
