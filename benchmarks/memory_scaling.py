"""Memory of a rank against the number of ranks, by what it is for.

``python -m benchmarks.memory_scaling feed_forward`` takes the model of Lightning's guide to tensor parallelism and real
tensors; ``python -m benchmarks.memory_scaling llama`` predicts a step of Llama-3 shapes on fake ones, with this library
and with torch's own styles. Both write JSON, a Markdown table and a plot.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import loss_parallel

import fabric_tp
from benchmarks.llama import FeedForward, Llama, Shape, torch_plan
from benchmarks.plot import markdown, plot_feed_forward, plot_llama
from fabric_tp.architectures.litgpt.config import load_config
from fabric_tp.measure.memory import Memory
from fabric_tp.measure.step import CountedStep, count_step, default_dtype
from fabric_tp.mesh import fake_mesh, fake_tensors

PUBLISHED = {1: 4.04, 2: 2.03, 4: 1.02, 8: 0.60}
"""GB on each GPU in Lightning's guide, "Tensor Parallelism", by the number of GPUs."""
OURS, PEER = "fabric_tp", "torch's styles"
LEAN: dict[str, Any] = {"fused_loss": True}
"""Options of this library that save memory and are not its defaults."""


def feed_forward(
    *, sizes: tuple[int, ...] = (1, 2, 4, 8), width: int = 8192, batch: int = 8, out: Path = Path("benchmarks/plots")
) -> None:
    """A SwiGLU feed-forward model with AdamW in fp32, as in Lightning's guide, on real tensors.

    The bytes are those of rank 0 of so many, with collectives that go nowhere; for two ranks the memory of two real
    processes is measured as well.

    Args:
        sizes: Tensor-parallel ranks.
        width: Of input and hidden layer.
        batch: Rows of the input.
        out: A directory for the results.
    """
    memory = {size: _feed_forward_memory(size, width, batch) for size in sizes}
    process = _in_processes(2, width, batch)
    rows = [
        [
            str(size),
            f"{memory[size].peak / 1e9:.2f}",
            f"{PUBLISHED[size]:.2f}" if size in PUBLISHED else "",
            f"{memory[sizes[0]].peak * sizes[0] / size / 1e9:.2f}",
            f"{process / 1e9:.2f}" if size == 2 else "",
        ]
        for size in sizes
    ]
    headings = ["ranks", "fabric_tp, GB", "published, GB", "1/t, GB", "two real processes, GB each"]
    result = {
        "width": width,
        "batch": batch,
        "bytes": {size: asdict(each) for size, each in memory.items()},
        "process": process,
    }
    _write(out, "feed_forward", result, markdown(headings, rows))
    plot_feed_forward(memory, PUBLISHED, out / "feed_forward.png")


def llama(
    *,
    models: tuple[str, ...] = ("Llama-3.2-1B", "Llama-3-8B", "Llama-3-70B"),
    tensor_parallel_sizes: tuple[int, ...] = (1, 2, 4, 8),
    data_parallel_sizes: tuple[int, ...] = (1, 8),
    length: int = 8192,
    out: Path = Path("benchmarks/plots"),
) -> None:
    """Llama-3 shapes in bf16 with AdamW, one sample per data-parallel rank, predicted.

    Args:
        models: Names of litgpt.
        tensor_parallel_sizes: Ranks over which each layer is split.
        data_parallel_sizes: Ranks of FSDP2.
        length: Tokens of the sample.
        out: A directory for the results.
    """
    for name in models:
        results: dict[tuple[int, int], dict[str, Memory]] = {}
        rows = []
        for data in data_parallel_sizes:
            for size in tensor_parallel_sizes:
                found = {OURS: ours(name, data, size, length).memory, PEER: peer(name, data, size, length).memory}
                results[data, size] = found
                gib = [found[way].peak / 2**30 for way in (OURS, PEER)]
                rows.append([str(data), str(size), *(f"{value:.1f}" for value in gib), f"{gib[0] / gib[1]:.2f}"])
                print(name, *rows[-1], flush=True)
        headings = ["data parallel", "tensor parallel", f"{OURS}, GiB", f"{PEER}, GiB", "share"]
        figures = [
            {
                "data_parallel_size": data,
                "tensor_parallel_size": size,
                **{way: asdict(each) for way, each in found.items()},
            }
            for (data, size), found in results.items()
        ]
        _write(out, name, {"length": length, "memory": figures}, markdown(headings, rows))
        plot_llama(name, results, out / f"{name}.png")


def ours(model: str, data_parallel_size: int, tensor_parallel_size: int, length: int) -> CountedStep:
    """litgpt's model with this library."""
    sizes = {"data_parallel_size": data_parallel_size, "tensor_parallel_size": tensor_parallel_size}
    return fabric_tp.estimate(model, fabric_tp.litgpt(**LEAN), sequence_length=length, **sizes)  # type: ignore[arg-type]


def peer(model: str, data_parallel_size: int, tensor_parallel_size: int, length: int) -> CountedStep:
    """The same shapes with torch's own styles, FSDP2 and ``loss_parallel``, as its tutorial combines them."""
    shape = shape_of(model, length)
    with fake_mesh(data_parallel_size, tensor_parallel_size) as mesh, fake_tensors():
        with default_dtype(torch.bfloat16):
            whole = Llama(shape)
        return count_peer(whole, shape, mesh)


def count_peer(model: Llama, shape: Shape, mesh: DeviceMesh) -> CountedStep:
    torch_plan(model, mesh["tensor_parallel"])
    if mesh["data_parallel"].size() > 1:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["data_parallel"])
        fully_shard(model, mesh=mesh["data_parallel"])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens, targets = (torch.zeros(shape.batch, shape.length, dtype=torch.int64) for _ in range(2))
    with loss_parallel():
        return count_step(
            model,
            optimizer,
            lambda: model(tokens),
            lambda logits: F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
            mesh=mesh,
            batch=(tokens, targets),
            lm_head=model.output,
            update=optimizer.step,
        )


def shape_of(model: str, length: int) -> Shape:
    config = load_config(model)
    return Shape(
        layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_query_groups or config.n_head,
        hidden=config.intermediate_size or 4 * config.n_embd,
        vocabulary=config.padded_vocab_size or config.vocab_size,
        length=length,
    )


def _feed_forward_memory(size: int, width: int, batch: int) -> Memory:
    with fake_mesh(1, size) as mesh:
        return feed_forward_step(mesh, width, batch).memory


def feed_forward_step(mesh: DeviceMesh, width: int, batch: int) -> CountedStep:
    with torch.device("meta"):
        model = FeedForward(Shape(width=width, hidden=width))
    fabric_tp.feed_forward()(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.rand(batch, width)
    return count_step(model, optimizer, lambda: model(x), lambda y: y.sum(), mesh=mesh, batch=(x,))


def _in_processes(size: int, width: int, batch: int) -> int:
    """Bytes by which each of two real processes grows: the most of them."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    store = os.path.join(tempfile.mkdtemp(), "store")
    processes = [
        context.Process(target=_measure, args=(rank, size, store, width, batch, queue)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("A rank failed; its traceback is above.")
    return max(queue.get() for _ in processes)


def _measure(rank: int, size: int, store: str, width: int, batch: int, queue: Any) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data_parallel", "tensor_parallel"))
    feed_forward_step(mesh, 256, batch)  # what libraries take on their first use is not the model's
    before = psutil.Process().memory_info().rss
    feed_forward_step(mesh, width, batch)
    queue.put(_most_resident() - before)
    dist.destroy_process_group()


def _most_resident() -> int:
    """Bytes of memory that the process had at most; ``ru_maxrss`` would be that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def _write(out: Path, name: str, result: dict[str, Any], table: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    auto_cli([feed_forward, llama])
