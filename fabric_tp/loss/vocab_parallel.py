"""Cross-entropy of logits that are sharded over the vocabulary, or that need not be computed for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fabric_tp import _torch
from fabric_tp.autograd.collectives import SEQUENCE_DIM, Group, Layout
from fabric_tp.loss.deferred import DeferredLogits
from fabric_tp.loss.linear import CHUNK_SIZE, LinearLoss, linear_losses

Reduction = Literal["mean", "sum", "none"]

CHUNK_ELEMENTS = 2**22
"""Logits that are turned into fp32 at a time, so that no fp32 copy of all of them exists."""


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy like ``torch.nn.functional.cross_entropy``, of vocabulary-sharded or of plain logits.

    Two small collectives in the forward (the maximum; sum of exponentials and target logit in one), none in the
    backward. Needs no context manager. Computes in fp32 (in fp64 for fp64 logits) whatever the dtype of the logits.

    Args:
        logits: ``(..., v)``; a DTensor ``Shard(-1)`` on the tensor-parallel mesh, as ``loss_parallel=True`` leaves
            them, or a plain tensor with the whole vocabulary. As ``fused_loss=True`` leaves them, they are not
            computed: this is then :func:`linear_cross_entropy`.
        targets: ``(...)``, class indices in [0, v), the same on every tensor-parallel rank.
        ignore_index: Targets of this value add nothing to loss and gradient, and do not count for the mean.
        label_smoothing: Share of the target distribution that is uniform over the vocabulary (Szegedy et al. 2016).
        z_loss: Adds ``z_loss * log(Z)**2`` for each target, with Z the softmax denominator; 1e-4 in PaLM (Chowdhery
            et al. 2022, section 5) keeps log(Z) near zero.
        reduction: ``"mean"`` over the targets that are not ignored, ``"sum"``, or ``"none"`` for the loss of each
            target with the shape of ``targets``. As in torch, the mean over no targets is nan.

    Returns:
        The loss, a plain tensor, the same on every rank; fp32 or, for fp64 logits, fp64.

    Raises:
        ValueError: Shapes do not fit, a target is out of range, or the logits are sharded otherwise.
    """
    _check_options(reduction, label_smoothing)
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"The logits' shape {tuple(logits.shape)} without the vocabulary must be the targets' shape, but that is"
            f" {tuple(targets.shape)}."
        )
    vocabulary = logits.shape[-1]
    _check_targets(targets, vocabulary, ignore_index)
    if isinstance(logits, DeferredLogits):
        if logits.is_plain:
            return _deferred(logits, targets, ignore_index, label_smoothing, z_loss, reduction)
        logits = logits.compute()
    local, group = _local_logits(logits)
    losses = _CrossEntropy.apply(
        local.reshape(-1, local.shape[-1]),
        targets.reshape(-1),
        vocabulary,
        group,
        ignore_index,
        label_smoothing,
        z_loss,
    )
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() / (targets != ignore_index).sum() if reduction == "mean" else losses.sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mesh: DeviceMesh | None = None,
    input_layout: Layout = "replicate",
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """``cross_entropy(linear(hidden, weight, bias), targets)`` without the logits ever being whole.

    Logits exist for ``chunk_size`` rows at a time, in one buffer of the weight's dtype and one of fp32, which then hold
    their gradients. Rows whose target is ignored are not computed. Beyond these buffers and the gradients there is
    nothing of the size of the input but, under ``input_layout="sequence"``, the gathered input, whose place its
    gradient takes. Gradients are computed together with the loss: three matrix products as without the fusion (four
    for ``reduction="none"``, whose gradient is not known before the backward), and the sum over the ranks of the
    input's gradient is part of the forward.

    The linear layer and the loss in one, chunked, with gradients in the forward: Hsu et al., "Liger Kernel" (2024);
    the softmax denominator from each rank's maximum and sum of exponentials: Milakov and Gimelshein, "Online normalizer
    calculation for softmax" (2018).

    ============  ===========================  =====================================================
    input_layout  hidden                       collectives
    ============  ===========================  =====================================================
    replicate     (..., h), the same on every  a small all-gather for each chunk; all-reduce of the
                  rank                         gradient of hidden
    sequence      (b, s/t, h)                  all-gather; the small ones; reduce-scatter
    ============  ===========================  =====================================================

    With ``reduction="none"``, and where no gradient is needed, there is one small all-gather for all chunks.

    Args:
        hidden: The input of the linear layer; ``input_layout`` says how it lies.
        weight: ``(v, h)``, a DTensor ``Shard(0)`` on the tensor-parallel mesh; or a plain tensor, which is this rank's
            ``(v/t, h)`` if ``mesh`` is given and the whole vocabulary otherwise.
        targets: ``(...)`` or ``(b, s)``, whole and the same on every rank.
        bias: ``(v,)``, in the form of ``weight``.
        mesh: The one-dimensional tensor-parallel mesh of a plain ``weight``.
        softcap: The logits ``x`` become ``softcap * tanh(x / softcap)`` (Gemma 2).
        chunk_size: In rows.

    The other options, the result and errors are those of :func:`cross_entropy`.

    Raises:
        ValueError: Shapes do not fit, a target is out of range, or the weight is sharded otherwise: under FSDP2 use
            this within the forward of the module that holds the weight, or ``fused_loss=True`` of the factories.
    """
    _check_options(reduction, label_smoothing)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive.")
    local_weight, group = _local_rows(weight, "weight")
    local_bias = None if bias is None else _local_rows(bias, "bias")[0]
    if mesh is not None:
        group = Group.of(mesh)
    spec = LinearLoss(
        group=group,
        columns=len(local_weight),
        layout=input_layout,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        chunk_size=chunk_size,
    )
    _check_linear(hidden, local_weight, local_bias, targets, spec)
    _check_targets(targets, spec.vocabulary, ignore_index)
    return _reduced(hidden, local_weight, local_bias, targets, spec, reduction)


def _reduced(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: LinearLoss, reduction: Reduction
) -> Tensor:
    """With the rows of each rank one after the other, as a gather without copies leaves them."""
    by_rank = targets.unflatten(SEQUENCE_DIM, (spec.ranks, -1)).movedim(SEQUENCE_DIM, 0) if spec.gathers else targets
    losses = linear_losses(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, by_rank.reshape(-1), spec, summed=reduction != "none"
    )
    if reduction == "none":
        losses = losses.view(by_rank.shape)
        return losses.movedim(0, SEQUENCE_DIM).flatten(SEQUENCE_DIM, SEQUENCE_DIM + 1) if spec.gathers else losses
    return losses / (targets != spec.ignore_index).sum() if reduction == "mean" else losses


def _deferred(
    logits: DeferredLogits,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: Reduction,
) -> Tensor:
    """Rows that were not selected have no target."""
    head, rows = logits.used(), logits.rows
    every = targets
    if rows is not None:
        every = targets.new_full(head.shape[:-1], ignore_index)
        every.view(-1)[rows] = targets
    spec = LinearLoss(
        group=head.group,
        columns=len(head.weight),
        layout=head.layout,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=logits.softcap,
        chunk_size=CHUNK_SIZE,
    )
    losses = _reduced(head.hidden, head.weight, head.bias, every, spec, reduction)
    return losses if rows is None or reduction != "none" else losses.flatten()[rows]


def _local_rows(x: Tensor, name: str) -> tuple[Tensor, Group | None]:
    if not isinstance(x, DTensor):
        return x, None
    if len(x.placements) != 1 or not x.placements[0].is_shard(0):
        raise ValueError(
            f"The {name} as a DTensor must be split by rows, Shard(0), on the one-dimensional tensor-parallel mesh, and"
            f" this is {x.placements} on a mesh of {x.device_mesh.ndim} dimensions. If FSDP2 shards it too, it is whole"
            " only within the forward of its module: use fused_loss=True of the factories and fabric_tp.cross_entropy."
        )
    return x.to_local(grad_placements=[Shard(0)]), Group.of(x.device_mesh)


def _check_options(reduction: str, label_smoothing: float) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is not known; it must be 'mean', 'sum' or 'none'.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1].")


def _check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: LinearLoss) -> None:
    if spec.layout not in ("replicate", "sequence"):
        raise ValueError(f"input_layout={spec.layout!r} is not known; it must be 'replicate' or 'sequence'.")
    if (
        weight.dim() != 2
        or hidden.shape[-1:] != weight.shape[1:]
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise ValueError(
            f"The input {tuple(hidden.shape)}, this rank's weight {tuple(weight.shape)} and its bias"
            f" {None if bias is None else tuple(bias.shape)} do not make a linear layer."
        )
    rows = list(hidden.shape[:-1])
    if spec.gathers:
        rows[SEQUENCE_DIM] *= spec.ranks
    if tuple(rows) != targets.shape:
        raise ValueError(
            f"Targets of the shape {tuple(rows)} belong to the input of the shape {tuple(hidden.shape)} under"
            f" input_layout={spec.layout!r} on {spec.ranks} ranks, but theirs is {tuple(targets.shape)}."
        )


def count_targets(targets: Tensor | Iterable[Tensor], mesh: DeviceMesh, *, ignore_index: int = -100) -> Tensor:
    """What to divide the summed loss by, so that every target of the global batch weighs the same.

    Data-parallel ranks and micro-batches hold different numbers of targets that count: a mean of means would weigh
    targets of short samples more. FSDP2 averages gradients over the data-parallel ranks, hence the mean number and not
    the sum::

        count = fabric_tp.count_targets([targets for _, targets in micro_batches], fabric.strategy.device_mesh)
        for inputs, targets in micro_batches:
            loss = fabric_tp.cross_entropy(model(inputs), targets, reduction="sum") / count
            fabric.backward(loss)

    The mean over ranks (``fabric.all_reduce(loss)``) of the sum of these losses is the loss per target of the step.

    Args:
        targets: ``(...)``, of this rank's micro-batches of one step.
        mesh: With a dimension "data_parallel", the others seeing the same targets; one small all-reduce over it.
        ignore_index: As in :func:`cross_entropy`.

    Returns:
        A tensor ``()``: the targets of the global batch that are not ignored, divided by the data-parallel ranks; at
        least 1, so that a batch without any has the loss 0.
    """
    each = [targets] if isinstance(targets, Tensor) else list(targets)
    count = torch.stack([(t != ignore_index).sum() for t in each]).sum().float()
    if "data_parallel" in (mesh.mesh_dim_names or ()) and mesh["data_parallel"].size() > 1:
        dist.all_reduce(count, group=mesh.get_group("data_parallel"))
        count /= mesh["data_parallel"].size()
    return count.clamp(min=1)


def _local_logits(logits: Tensor) -> tuple[Tensor, Group | None]:
    """This rank's columns, and the group over which they are split."""
    if not isinstance(logits, DTensor):
        return logits, None
    last = logits.dim() - 1
    if len(logits.placements) != 1 or not logits.placements[0].is_shard(last):
        raise ValueError(
            f"Logits as a DTensor must be split over the vocabulary, Shard({last}), on the one-dimensional"
            f" tensor-parallel mesh, and these are {logits.placements}."
        )
    return logits.to_local(grad_placements=[Shard(last)]), Group.of(logits.device_mesh)


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    if _torch.is_fake(targets):
        return
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    message = f"Targets must lie in [0, {vocabulary}) or be ignore_index={ignore_index}"
    if targets.device.type != "cpu":
        _torch.assert_on_device(~wrong.any(), f"{message}.")
    elif wrong.any():
        raise ValueError(f"{message}, but {int(wrong.sum())} are not, {int(targets[wrong][0])} for one.")


class _CrossEntropy(Function):
    """Of a row x with target c: ``lse - (1 - a) x[c] - a mean(x) + z lse**2``, and ``lse = log(sum(exp(x)))``.

    Its gradient is ``(1 + 2 z lse) softmax(x) - (1 - a) onehot(c) - a / v``. Rows are turned to fp32 a chunk at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        vocabulary: int,
        group: Group | None,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
    ) -> Tensor:
        columns = logits.shape[1]
        first = columns * group.rank if group else 0
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        ignored = targets == ignore_index
        local = targets - first
        elsewhere = ignored | (local < 0) | (local >= columns)
        local = local.masked_fill(elsewhere, 0)

        maximum = logits.amax(-1).to(dtype)
        if group and group.size > 1:
            maximum = _torch.all_reduce(maximum, group.name, "max")
        target_logit = logits.gather(1, local[:, None]).squeeze(1).to(dtype) - maximum
        parts = [torch.empty_like(maximum), target_logit.masked_fill_(elsewhere, 0)]
        if smoothing:
            parts.append(torch.empty_like(maximum))
        packed = torch.stack(parts)
        for rows in _chunks(logits):
            shifted = logits[rows].to(dtype) - maximum[rows, None]
            if smoothing:
                packed[2, rows] = shifted.sum(-1)
            packed[0, rows] = shifted.exp_().sum(-1)
        if group and group.size > 1:
            packed = _torch.all_reduce(packed, group.name)

        log_z = packed[0].log()  # of the shifted logits
        losses = log_z - (1 - smoothing) * packed[1]
        if smoothing:
            losses -= smoothing / vocabulary * packed[2]
        log_z += maximum
        if z_loss:
            losses += z_loss * log_z.square()
        # Not log_z: next to a large maximum the sum's logarithm loses its digits.
        ctx.save_for_backward(logits, local, elsewhere, ignored, maximum, packed[0])
        ctx.vocabulary, ctx.smoothing, ctx.z_loss = vocabulary, smoothing, z_loss
        return losses.masked_fill_(ignored, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, local, elsewhere, ignored, maximum, sums = ctx.saved_tensors
        grad = grad.masked_fill(ignored, 0)
        of_exponentials = grad * (1 + 2 * ctx.z_loss * (maximum + sums.log())) / sums
        of_target = (-(1 - ctx.smoothing) * grad).masked_fill(elsewhere, 0)
        of_all = -ctx.smoothing / ctx.vocabulary * grad
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            part = (logits[rows].to(maximum.dtype) - maximum[rows, None]).exp_().mul_(of_exponentials[rows, None])
            if ctx.smoothing:
                part += of_all[rows, None]
            part.scatter_add_(1, local[rows, None], of_target[rows, None])
            result[rows] = part
        return result, None, None, None, None, None, None


def _chunks(logits: Tensor) -> list[slice]:
    rows, columns = logits.shape
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
