"""The losses: what they are given is checked, and one of two ways taken through the logits."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fabric_tp import _torch
from fabric_tp.autograd.collectives import SEQUENCE_DIM, Group, Layout
from fabric_tp.autograd.padding import rows_to_fill
from fabric_tp.loss.deferred import DeferredLogits
from fabric_tp.loss.fused import deferred_loss, linear_loss
from fabric_tp.loss.options import CHUNK_SIZE, LossOptions, Reduction
from fabric_tp.loss.targets import Vocabulary
from fabric_tp.loss.vocab_parallel import vocab_parallel_loss


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
    options = LossOptions(
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction
    )
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"The logits' shape {tuple(logits.shape)} without the vocabulary must be the targets' shape, but that is"
            f" {tuple(targets.shape)}."
        )
    _check_targets(targets, logits.shape[-1], ignore_index)
    if isinstance(logits, DeferredLogits) and not logits.is_plain:
        logits = logits.compute()
    if not isinstance(logits, DeferredLogits):
        local, group = _local(logits, logits.dim() - 1, "tensor of logits")
        return vocab_parallel_loss(local, targets, Vocabulary(logits.shape[-1], group), options)
    return deferred_loss(logits, targets, options)


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

    Logits exist for ``chunk_size`` rows at a time, and not for rows whose target is ignored. Gradients are computed
    together with the loss: three matrix products as without the fusion, four for ``reduction="none"``. Collectives, of
    the backward too, are in the forward; ``fabric_tp/loss/fused.py`` says which, and what is in memory.

    Args:
        hidden: ``(..., h)``, the same on every rank; under ``input_layout="sequence"`` this rank's ``(b, s/t, h)``,
            rounded up, of a sequence with rows at its end that do not count.
        weight: ``(v, h)``, a DTensor ``Shard(0)`` on the tensor-parallel mesh; or a plain tensor, which is this rank's
            ``(v/t, h)`` if ``mesh`` is given, of as many rows as every other's, and the whole vocabulary otherwise.
        targets: ``(...)`` or ``(b, s)``, whole and the same on every rank.
        bias: ``(v,)``, in the form of ``weight``.
        mesh: The one-dimensional tensor-parallel mesh of a plain ``weight``.
        softcap: The logits ``x`` become ``softcap * tanh(x / softcap)`` (Gemma 2).
        chunk_size: Rows whose logits exist at a time.

    The other options, the result and errors are those of :func:`cross_entropy`.

    Raises:
        ValueError: Shapes do not fit, a target is out of range, or the weight is sharded otherwise: under FSDP2 use
            this within the forward of the module that holds the weight, or ``fused_loss=True`` of the factories.
    """
    options = LossOptions(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        softcap=softcap,
        chunk_size=chunk_size,
    )
    local_weight, local_bias, group = _local_layer(weight, bias, mesh)
    _check_linear(hidden, local_weight, local_bias, targets, group, input_layout)
    vocabulary = Vocabulary(len(weight) if isinstance(weight, DTensor) else len(weight) * group.size, group)
    _check_targets(targets, vocabulary.size, ignore_index)
    return linear_loss(hidden, local_weight, local_bias, targets, vocabulary, input_layout, options)


def _local(x: Tensor, dim: int, name: str, hint: str = "") -> tuple[Tensor, Group]:
    """This rank's part of the vocabulary, and the group over which it is split."""
    if not isinstance(x, DTensor):
        return x, Group.alone()
    if len(x.placements) != 1 or not x.placements[0].is_shard(dim):
        raise ValueError(
            f"The {name} as a DTensor must be split over the vocabulary, Shard({dim}), on the one-dimensional"
            f" tensor-parallel mesh, but is {x.placements} on a mesh of {x.device_mesh.ndim} dimensions.{hint}"
        )
    return x.to_local(grad_placements=[Shard(dim)]), Group.of(x.device_mesh)


def _local_layer(weight: Tensor, bias: Tensor | None, mesh: DeviceMesh | None) -> tuple[Tensor, Tensor | None, Group]:
    hint = (
        " If FSDP2 shards it too, it is whole only within the forward of its module: use fused_loss=True of the"
        " factories and fabric_tp.cross_entropy."
    )
    local_weight, group = _local(weight, 0, "weight", hint)
    local_bias = None if bias is None else _local(bias, 0, "bias", hint)[0]
    return local_weight, local_bias, group if mesh is None else Group.of(mesh)


def _check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, group: Group, layout: Layout
) -> None:
    if layout not in ("replicate", "sequence"):
        raise ValueError(f"input_layout={layout!r} is not known; it must be 'replicate' or 'sequence'.")
    fits = weight.dim() == 2 and hidden.shape[-1:] == weight.shape[1:]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"The input {tuple(hidden.shape)}, this rank's weight {tuple(weight.shape)} and its bias"
            f" {None if bias is None else tuple(bias.shape)} do not make a linear layer."
        )
    rows = list(hidden.shape[:-1])
    if layout == "sequence" and group.size > 1:
        filled = targets.shape[SEQUENCE_DIM] + rows_to_fill(targets.shape[SEQUENCE_DIM], group.size)
        rows[SEQUENCE_DIM] *= group.size
        if rows[SEQUENCE_DIM] == filled:
            rows[SEQUENCE_DIM] = targets.shape[SEQUENCE_DIM]
    if tuple(rows) != targets.shape:
        raise ValueError(
            f"Targets of the shape {tuple(rows)} belong to the input of the shape {tuple(hidden.shape)} under"
            f" input_layout={layout!r} on {group.size} ranks, but theirs is {tuple(targets.shape)}."
        )


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    if _torch.is_fake(targets):
        return
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    message = f"Targets must lie in [0, {vocabulary}) or be ignore_index={ignore_index}"
    if targets.device.type != "cpu":
        _torch.assert_on_device(~wrong.any(), f"{message}.")
    elif wrong.any():
        raise ValueError(f"{message}, but {int(wrong.sum())} are not, {int(targets[wrong][0])} for one.")
