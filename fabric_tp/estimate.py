"""What a step will need on each rank, from a step of one rank on tensors without memory."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fabric_tp.communication import Collective
from fabric_tp.loss import cross_entropy
from fabric_tp.memory import KINDS, Kind
from fabric_tp.parallelize import ActivationCheckpointing, Parallelize, litgpt
from fabric_tp.step import Step, count_step, default_dtype, pretend_mesh, pretend_tensors

if TYPE_CHECKING:  # it takes seconds to import, and not every user of this package has such a model
    from litgpt import Config

Precision = Literal["bf16-true", "bf16-mixed", "32-true"]
"""As in Fabric. ``"bf16-mixed"`` is FSDP2's: fp32 parameters that are cast to bf16 for the computation."""

SHORT = (4, 5)
"""Layers of the models by which :func:`fit` rules out most ways, without a step of the whole one."""


@dataclass(frozen=True)
class Estimate(Step):
    """What :func:`estimate` found. ``print`` shows it as a table."""

    model: str
    tensor_parallel_size: int
    data_parallel_size: int
    micro_batch_size: int
    sequence_length: int
    precision: Precision
    least: dict[Kind, int]
    """The limit of a formula for each kind; see :func:`least_memory`."""
    parallelize: Parallelize

    @property
    def least_peak(self) -> int:
        """Parameters and optimizer state live always; activations and logits while there are no gradients yet."""
        least = self.least
        always = least["parameters"] + least["optimizer state"] + least["collective buffers"]
        return always + max(least["activations"] + least["logits and loss"], least["gradients"])

    @property
    def tokens(self) -> int:
        """Tokens of all ranks in one micro-batch."""
        return self.data_parallel_size * self.micro_batch_size * self.sequence_length

    def to_dict(self) -> dict[str, Any]:
        """Everything but the parallelization, for JSON."""
        names = ("model", "tensor_parallel_size", "data_parallel_size", "micro_batch_size", "sequence_length")
        return {
            **{name: getattr(self, name) for name in (*names, "precision", "least", "least_peak")},
            **vars(self.memory),
            "sent": {axis: self.sent(axis) for axis in sorted({each.axis for each in self.collectives})},
        }

    def __str__(self) -> str:
        memory = self.memory
        table = Table(
            title=f"GiB on each rank: {self.model}, {self.precision}, {self.micro_batch_size} x {self.sequence_length}"
            f" tokens, tensor parallel {self.tensor_parallel_size} x data parallel {self.data_parallel_size}",
            title_justify="left",
        )
        table.add_column("")
        for heading in ("at the peak", "at most", "formula's limit"):
            table.add_column(heading, justify="right")
        for kind in KINDS:
            limit = gib(self.least[kind]) if kind in self.least else ""
            table.add_row(kind, gib(memory.at_peak[kind]), gib(memory.most[kind]), limit)
        table.add_section()
        table.add_row(f"peak, in {memory.phase}", gib(memory.peak), "", gib(self.least_peak))
        wire = Table(title="Collectives of one step", title_justify="left")
        for heading in ("ranks", "collective", "times", "GiB sent by each rank"):
            wire.add_column(heading, justify="left" if heading in ("ranks", "collective") else "right")
        for (axis, collective), group in _grouped(self.collectives).items():
            wire.add_row(axis.replace("_", " "), collective, str(len(group)), gib(sum(each.sent for each in group), 4))
        return render(table, wire)


def estimate(
    model: str | Path | Config,
    parallelize: Parallelize | None = None,
    *,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    micro_batch_size: int = 1,
    sequence_length: int | None = None,
    precision: Precision = "bf16-true",
) -> Estimate:
    """Memory of each rank and bytes on the wire in a training step of a litgpt model; needs no GPU and no memory.

    Rank 0 of the mesh runs a real step (forward, loss, backward, clipping, fused AdamW) on fake tensors with
    collectives that go nowhere, with the optimizer's state of an earlier step. What an operation takes and gives back
    within itself, and what the allocator wastes, is not in it. Blocks are counted as if they were not compiled:
    compiled ones keep as much, and without sequence parallelism also outputs of norms. Experts get equally many tokens.

    Args:
        model: A name that litgpt knows (``"Llama-3-8B"``), a checkpoint directory, or a config.
        parallelize: What the strategy will be given; ``fabric_tp.litgpt()`` by default.
        tensor_parallel_size: Ranks over which each layer is split.
        data_parallel_size: Ranks of FSDP2.
        micro_batch_size: Samples of each data-parallel rank.
        sequence_length: Tokens of a sample; the model's ``block_size`` by default.
        precision: See :data:`Precision`.

    Raises:
        ValueError: The model is not known, sizes cannot be divided (as ``Parallelize.check`` finds out), or the
            process has a process group, which this would need for itself.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r} is not known; it must be one of {get_args(Precision)}.")
    for name, number in (("data_parallel_size", data_parallel_size), ("micro_batch_size", micro_batch_size)):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")
    from litgpt import GPT

    config = load_config(model)
    length = sequence_length or config.block_size
    parallelize = replace(parallelize or litgpt(), compile=False)
    if precision == "bf16-mixed":
        parallelize = replace(parallelize, mixed_precision="bf16-mixed")
    with torch.device("meta"):
        meta_model = GPT(config)
    parallelize.check(meta_model, tensor_parallel_size=tensor_parallel_size, sequence_length=length)

    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    with pretend_mesh(data_parallel_size, tensor_parallel_size) as mesh, pretend_tensors(config.n_expert or 1):
        step = _count(config, parallelize, mesh, (micro_batch_size, length), dtype)
    limits = least_memory(
        meta_model,
        parallelize,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        tokens=micro_batch_size * length,
        precision=precision,
    )
    return Estimate(
        memory=step.memory,
        collectives=step.collectives,
        model=config.name,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        micro_batch_size=micro_batch_size,
        sequence_length=length,
        precision=precision,
        least=limits,
        parallelize=parallelize,
    )


def _count(
    config: Config, parallelize: Parallelize, mesh: DeviceMesh, batch: tuple[int, int], dtype: torch.dtype
) -> Step:
    from litgpt import GPT

    with default_dtype(dtype):
        gpt = GPT(config)
    gpt.max_seq_length = batch[1]
    gpt.reset_parameters()  # the rotary tables, which Fabric leaves in fp32
    parallelize(gpt, mesh)
    tokens, targets = (torch.zeros(batch, dtype=torch.int64) for _ in range(2))
    return count_step(
        gpt,
        torch.optim.AdamW(gpt.parameters(), fused=True),
        lambda: gpt(tokens),
        lambda logits: cross_entropy(logits, targets),
        mesh=mesh,
        batch=(tokens, targets),
        warm_up=False,
    )


def fit(
    model: str | Path | Config,
    parallelize: Parallelize | None = None,
    *,
    memory: int,
    devices: int,
    max_tensor_parallel_size: int = 8,
    micro_batch_size: int = 1,
    sequence_length: int | None = None,
    precision: Precision = "bf16-true",
) -> Iterator[Estimate]:
    """The ways to train on so many devices that fit, at most one for each mesh.

    On each mesh the options are tried from the fastest to the leanest: without activation checkpointing, selective,
    full; each without and with freeing gathered parameters after the forward. The first that fits is the one.
    :func:`cheapest` sorts them.

    Args:
        model: As in :func:`estimate`, like the other arguments.
        parallelize: Its other options are kept.
        memory: Bytes that the peak may take.
        devices: The number of ranks; each way uses them all.
        max_tensor_parallel_size: The devices of one machine.
    """
    parallelize = parallelize or litgpt()
    sizes: dict[str, Any] = {
        "micro_batch_size": micro_batch_size,
        "sequence_length": sequence_length,
        "precision": precision,
    }
    from litgpt import GPT

    config = load_config(model)
    with torch.device("meta"):
        meta_model = GPT(config)
    for size in range(1, min(devices, max_tensor_parallel_size) + 1):
        if devices % size:
            continue
        try:
            parallelize.check(meta_model, tensor_parallel_size=size, sequence_length=sequence_length)
        except ValueError:
            continue
        sizes |= {"tensor_parallel_size": size, "data_parallel_size": devices // size}
        for option in _from_fast_to_lean(parallelize, devices // size):
            if least_peak_by_layers(config, option, sizes) > memory:
                continue
            found = estimate(config, option, **sizes)
            if found.memory.peak <= memory:
                yield found
                break


def cheapest(estimates: Iterable[Estimate]) -> list[Estimate]:
    """Sorted by the bytes that a rank sends for each token of the run, the fewest first."""
    return sorted(estimates, key=lambda each: (each.sent() / each.tokens, each.memory.peak))


def least_memory(
    model: nn.Module,
    parallelize: Parallelize,
    *,
    tensor_parallel_size: int,
    data_parallel_size: int,
    tokens: int,
    precision: Precision,
) -> dict[Kind, int]:
    """The limits by formula, in bytes on each rank, for ``tokens`` tokens of each data-parallel rank.

    Parameters, gradients and AdamW's two states divide by all ranks. With width h, all query heads q wide, all key and
    value heads k each, MLP f, vocabulary v, t tensor-parallel ranks and e bytes a number, a layer must keep for the
    backward, of each token, the inputs of attention and MLP, the attention's q, k, v and result, and what the MLP's
    first layers give: ``e (2 h + 2 q + 2 k + 2 f) / t`` (one f without a gate; times the experts that a token visits);
    with full checkpointing ``e h / t``, and with selective ``e (2 h + q) / t``. The logits take ``(e + 4) v / t``, or
    nothing where loss and head are one. Collectives need the input of one attention or MLP whole, ``e h`` per token,
    and FSDP2 the parameters of one block.
    """
    config: Config = model.config  # type: ignore[assignment]
    size, dtype_size = tensor_parallel_size, 4 if precision == "32-true" else 2
    stored = (2 if precision == "bf16-true" else 4) * sum(parameter.numel() for parameter in model.parameters())
    stored = math.ceil(stored / (size * data_parallel_size))
    width, attention = config.n_embd, config.n_head * config.head_size
    key_value = config.n_query_groups * config.head_size
    experts = config.n_expert_per_token if config.mlp_class_name == "LLaMAMoE" else 1
    hidden = config.moe_intermediate_size if experts > 1 and config.moe_intermediate_size else config.intermediate_size
    gated = 1 if config.mlp_class_name == "GptNeoxMLP" else 2
    kept = {
        "none": 2 * width + 2 * attention + 2 * key_value + gated * hidden * experts,
        "selective": 2 * width + attention,
        "full": width,
    }[parallelize.activation_checkpointing]
    block = sum(parameter.numel() for parameter in model.transformer.h[0].parameters())  # type: ignore[index, union-attr]
    gathered = (tokens * width if size > 1 else 0) + (block // size if data_parallel_size > 1 else 0)
    logits = 0 if getattr(parallelize, "fused_loss", False) else tokens * config.padded_vocab_size * (dtype_size + 4)
    return {
        "parameters": stored,
        "gradients": stored,
        "optimizer state": 2 * stored,
        "activations": tokens * config.n_layer * kept * dtype_size // size,
        "logits and loss": logits // size,
        "collective buffers": gathered * dtype_size,
    }


def load_config(model: str | Path | Config) -> Config:
    """The config of a litgpt model, by name or checkpoint directory.

    Raises:
        ValueError: Neither.
    """
    from litgpt import Config
    from litgpt.config import configs

    if isinstance(model, Config):
        return model
    file = Path(model) / "model_config.yaml"
    if file.is_file():
        return Config.from_file(file)
    name = str(model).rpartition("/")[2]
    names = [str(config["name"]) for config in configs]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
        raise ValueError(
            f"{str(model)!r} is neither a name that litgpt knows nor a directory with a model_config.yaml. Names like"
            f" it are {', '.join(close) or ', '.join(names[:5])}."
        )
    return Config.from_name(name)


def gib(nbytes: int, digits: int = 2) -> str:
    return f"{nbytes / 2**30:.{digits}f}"


def render(*tables: Table) -> str:
    console = Console(file=StringIO(), width=120, force_terminal=False)
    for table in tables:
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _grouped(collectives: Iterable[Collective]) -> dict[tuple[str, str], list[Collective]]:
    groups: dict[tuple[str, str], list[Collective]] = {}
    for collective in collectives:
        groups.setdefault((collective.axis, collective.kind), []).append(collective)
    return dict(sorted(groups.items(), reverse=True))


def _from_fast_to_lean(parallelize: Parallelize, data_parallel_size: int) -> Iterator[Parallelize]:
    for checkpointing in get_args(ActivationCheckpointing):
        option = replace(parallelize, activation_checkpointing=checkpointing)
        if data_parallel_size > 1:
            yield replace(option, reshard_after_forward=False)
        yield replace(option, reshard_after_forward=True)


def least_peak_by_layers(config: Config, parallelize: Parallelize, sizes: dict[str, Any]) -> int:
    """A bound from below for the peak, from models with fewer layers.

    At any one moment of the step the bytes grow linearly with the number of layers, so that the peak, the largest of
    them, is convex: it lies above the line through two of its points.
    """
    few, more = SHORT
    if config.n_layer <= few + more or config.sliding_window_size is not None:
        return 0
    peaks = []
    for layers in SHORT:
        short = copy.copy(config)
        short.n_layer = layers
        peaks.append(estimate(short, parallelize, **sizes).memory.peak)
    return peaks[0] + (peaks[1] - peaks[0]) * (config.n_layer - few) // (more - few)
