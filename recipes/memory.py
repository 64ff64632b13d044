"""What a step will need, said before it starts."""

import os
from typing import Any, get_args

import psutil
import torch
from arguments import Job, parallelization
from litgpt import Config

import fabric_tp
from fabric_tp.measure import Estimate
from fabric_tp.measure.estimation import Precision


def say_memory(job: Job, config: Config) -> None:
    """Of each process, in words and numbers, by the first; before processes meet, since it needs a process group for
    itself."""
    if any(os.environ.get(name, "0") != "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")):
        return
    found = fabric_tp.estimate(
        config,
        parallelization(job.args),
        tensor_parallel_size=job.sizes.tensor_parallel,
        data_parallel_size=job.sizes.data_parallel,
        micro_batch_size=job.sizes.micro_batch,
        sequence_length=job.args.max_seq_length,
        precision=precision(job),
    )
    print(describe(found, available(job)), flush=True)


def precision(job: Job) -> Precision:
    """What `fabric run --precision` was given, where the estimate knows it."""
    given: Any = job.args.mixed_precision or os.environ.get("LT_PRECISION")
    return given if given in get_args(Precision) else "32-true"


def available(job: Job) -> int:
    """Bytes for each process: of its GPU, or its share of this machine's memory."""
    if job.launcher.accelerator == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total // (job.launcher.processes // job.launcher.nodes)


def describe(found: Estimate, room: int) -> str:
    memory = found.memory
    kinds = sorted(((size, kind) for kind, size in memory.at_peak.items() if size > memory.peak / 1000), reverse=True)
    parts = ", ".join(f"{readable(size)} {kind}" for size, kind in kinds)
    text = (
        f"memory: {readable(memory.peak)} for each process at the peak of a step of {found.micro_batch_size} x"
        f" {found.sequence_length} tokens, in {memory.phase}: {parts}. There are {readable(room)} for each."
    )
    if memory.peak <= room:
        return text
    return (
        f"{text} That is too little. Fewer samples at once (--micro_batch_size), more processes, --lora true,"
        " --activation_checkpointing full and fabric run's --precision bf16-true are the ways out."
    )


def readable(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
