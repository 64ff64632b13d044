"""What a step will need on each rank, from a step of one rank on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fabric_tp.loss import cross_entropy
from fabric_tp.measure.communication import Collective
from fabric_tp.measure.layers import FEW, with_few_layers
from fabric_tp.measure.memory import KINDS, Kind, Memory
from fabric_tp.measure.operations import extended
from fabric_tp.measure.step import CountedStep, NotAlike, count_step, default_dtype
from fabric_tp.mesh import fake_mesh, fake_tensors
from fabric_tp.parallelize import Parallelize, litgpt
from fabric_tp.styles.quantized import quantizable

if TYPE_CHECKING:  # it takes seconds to import, and not every user of this package has such a model
    from litgpt import Config

Precision = Literal["bf16-true", "bf16-mixed", "32-true"]
"""As in Fabric. ``"bf16-mixed"`` is FSDP2's: fp32 parameters that are cast to bf16 for the computation."""


@dataclass(frozen=True)
class Estimate(CountedStep):
    """What :func:`estimate` found. ``print`` shows it as a table."""

    model: str
    tensor_parallel_size: int
    data_parallel_size: int
    micro_batch_size: int
    sequence_length: int
    precision: Precision
    least: dict[str, int]
    """The limit of a formula for each kind; ``least_memory`` in ``architectures/litgpt/memory.py``."""
    model_flops: int
    """Floating-point operations of the model in one micro-batch of all ranks; ``architectures/litgpt/flops.py``."""
    parallelize: Parallelize

    @property
    def least_peak(self) -> int:
        """What always lives, and the more of activations with logits, and gradients: they are not there at once."""
        return peak_of(self.least)

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
    compiled ones keep as much, and without sequence parallelism also outputs of norms, and with ``overlap`` their
    collectives are counted as without it. Experts get equally many tokens.
    Of blocks that are all alike a few run, and the others are counted as these.

    Args:
        model: A name that litgpt knows (``"Llama-3-8B"``), a checkpoint directory, or a config. With a
            ``litgpt.lora.Config`` only the low-rank adapters are trained.
        parallelize: What the strategy will be given; ``fabric_tp.litgpt()`` by default.
        tensor_parallel_size: Ranks over which each layer is split.
        data_parallel_size: Ranks of FSDP2.
        micro_batch_size: Samples of each data-parallel rank.
        sequence_length: Tokens of a sample; the model's ``block_size`` by default.
        precision: As in Fabric. ``"bf16-mixed"`` is FSDP2's: fp32 parameters, cast to bf16 for the computation.

    Raises:
        ValueError: The model is not known, sizes cannot be divided (as ``Parallelize.check`` finds out), or the
            process has a process group, which this would need for itself.

    Example::

        found = fabric_tp.estimate("Llama-3-8B", fabric_tp.litgpt(fused_loss=True), tensor_parallel_size=8)
        print(found)
        found.memory.peak / 2**30  # GiB
    """
    check_arguments(precision, data_parallel_size=data_parallel_size, micro_batch_size=micro_batch_size)
    from fabric_tp.architectures.litgpt.config import load_config, meta_model
    from fabric_tp.architectures.litgpt.flops import model_flops

    config = load_config(model)
    batch = (micro_batch_size, sequence_length or config.block_size)
    mixed: dict[str, Any] = {"mixed_precision": "bf16-mixed"} if precision == "bf16-mixed" else {}
    given = replace(parallelize or litgpt(), **mixed)
    parallelize = replace(given, compile=False, overlap=given.overlap and not given.compile)
    whole = meta_model(config)
    parallelize.check(whole, tensor_parallel_size=tensor_parallel_size)
    sizes = {"tensor_parallel_size": tensor_parallel_size, "data_parallel_size": data_parallel_size}
    least = least_of(whole, parallelize, sizes, batch[0] * batch[1], precision)
    shape: dict[str, Any] = {**sizes, "micro_batch_size": batch[0], "sequence_length": batch[1], "precision": precision}
    blocks: Any = whole.get_submodule("transformer.h")
    short = [each for layers in (FEW, FEW + 1) if (each := with_few_layers(config, blocks, layers)) is not None]
    try:
        steps = [_count(each, parallelize, sizes, batch, precision, config.n_layer) for each in short]
        step = _extended(*steps, times=config.n_layer - FEW)
    except NotAlike:
        step = _count(config, parallelize, sizes, batch, precision, config.n_layer)
    flops = model_flops(whole, batch[0] * batch[1] * data_parallel_size, batch[1])
    return Estimate(**vars(step), model=config.name, **shape, least=least, model_flops=flops, parallelize=given)


def _extended(*steps: CountedStep, times: int) -> CountedStep:
    """From steps that differ in what grows with the number of blocks outside of them: one by which it grew so often.

    Raises:
        NotAlike: There are not two, or they differ in something else.
    """
    if len(steps) < 2:
        raise NotAlike
    one, other = steps[0].memory, steps[1].memory
    try:
        few, more = (step.collectives for step in steps)
        collectives = tuple(each.extended(other, times) for each, other in zip(few, more, strict=True))
        events = extended(steps[0].events, steps[1].events, times)
    except ValueError as error:
        raise NotAlike from error
    if one.phase != other.phase:
        raise NotAlike

    def grown(few: dict[Kind, int], more: dict[Kind, int]) -> dict[Kind, int]:
        return {kind: few[kind] + times * (more[kind] - few[kind]) for kind in KINDS}

    at_peak = grown(one.at_peak, other.at_peak)
    memory = Memory(sum(at_peak.values()), one.phase, at_peak, grown(one.most, other.most))
    return CountedStep(memory, collectives, events)


def check_arguments(precision: str, **sizes: int) -> None:
    """Raises ValueError for a precision that is not known and for sizes below 1."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r} is not known; it must be one of {get_args(Precision)}.")
    for name, number in sizes.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")


def peak_of(least: Mapping[str, int]) -> int:
    """Parameters and optimizer state live always; activations and logits while there are no gradients yet."""
    always = least["parameters"] + least["optimizer state"] + least["collective buffers"]
    return always + max(least["activations"] + least["logits and loss"], least["gradients"])


def least_of(
    model: nn.Module, parallelize: Parallelize, sizes: dict[str, int], tokens: int, precision: Precision
) -> dict[str, int]:
    """Bytes of each kind on each rank that a litgpt model needs by formula; nothing is counted for it."""
    from fabric_tp.architectures.litgpt.memory import least_memory

    blocks: Any = model.get_submodule("transformer.h")
    return least_memory(
        model,
        **sizes,
        tokens=tokens,
        precision=precision,
        activation_checkpointing=parallelize.activation_checkpointing,
        reshard_after_forward=parallelize.reshard_after_forward,
        fused_loss=parallelize.fused_loss,
        quantized=sum(weight.numel() for weight in quantizable(blocks)) if parallelize.quantize else 0,
    )


def _count(
    config: Config,
    parallelize: Parallelize,
    sizes: dict[str, int],
    batch: tuple[int, int],
    precision: Precision,
    layers: int,
) -> CountedStep:
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    with (
        fake_mesh(sizes["data_parallel_size"], sizes["tensor_parallel_size"]) as mesh,
        fake_tensors(config.n_expert or 1),
    ):
        return _count_on(mesh, config, parallelize, batch, dtype, layers)


def _count_on(
    mesh: DeviceMesh, config: Config, parallelize: Parallelize, batch: tuple[int, int], dtype: torch.dtype, layers: int
) -> CountedStep:
    from fabric_tp.architectures.litgpt.config import model_for_length

    with default_dtype(dtype):
        model = model_for_length(config, batch[1])
    parallelize(model, mesh)
    tokens, targets = (torch.zeros(batch, dtype=torch.int64) for _ in range(2))
    return count_step(
        model,
        torch.optim.AdamW(model.parameters(), fused=True),
        lambda: model(tokens),
        lambda logits: cross_entropy(logits, targets),
        mesh=mesh,
        batch=(tokens, targets),
        lm_head=model.lm_head,
        warm_up=False,
        blocks=list(model.transformer.h),
        missing=layers - config.n_layer,
    )


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
