"""Cross-entropy of logits that are sharded over the vocabulary."""

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
from fabric_tp.styles.collectives import Group

CHUNK_ELEMENTS = 2**22
"""Logits that are turned into fp32 at a time, so that no fp32 copy of all of them exists."""


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Cross-entropy like ``torch.nn.functional.cross_entropy``, of vocabulary-sharded or of plain logits.

    Two small collectives in the forward (the maximum; sum of exponentials and target logit in one), none in the
    backward. Needs no context manager. Computes in fp32 (in fp64 for fp64 logits) whatever the dtype of the logits.

    Args:
        logits: ``(..., v)``; a DTensor ``Shard(-1)`` on the tensor-parallel mesh, as ``loss_parallel=True`` leaves
            them, or a plain tensor with the whole vocabulary.
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
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is not known; it must be 'mean', 'sum' or 'none'.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1].")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"The logits' shape {tuple(logits.shape)} without the vocabulary must be the targets' shape, but that is"
            f" {tuple(targets.shape)}."
        )
    vocabulary = logits.shape[-1]
    _check_targets(targets, vocabulary, ignore_index)
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
