"""Logits, targets and options, and what torch makes of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fabric_tp.testing.ranks import mesh

TOLERANCE = 1e-10
"""Of fp64."""

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "ignore_index": {"ignore_index": 3},
    "label_smoothing": {"label_smoothing": 0.1},
    "only_smoothing": {"label_smoothing": 1.0},
    "z_loss": {"z_loss": 0.01},
    "all": {"ignore_index": 3, "label_smoothing": 0.2, "z_loss": 0.01},
}
REDUCTIONS = ["mean", "sum", "none"]


def logits_and_targets(shape: tuple[int, ...], scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits in fp64, and targets of which some are 3."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    targets.view(-1)[::4] = 3
    return logits, targets


def ignore_some(targets: Tensor, ignore_index: int = -100, **_: Any) -> Tensor:
    targets = targets.clone()
    targets.view(-1)[1::3] = ignore_index
    return targets


def reference(
    logits: Tensor, targets: Tensor, *, reduction: str = "mean", z_loss: float = 0.0, **options: Any
) -> Tensor:
    """torch's cross-entropy, plus ``z_loss`` times the squared log of the softmax denominator."""
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction, **options)
    loss = loss.view(targets.shape) if reduction == "none" else loss
    if not z_loss:
        return loss
    counts = targets != options.get("ignore_index", -100)
    extra = z_loss * logits.exp().sum(-1).log().square() * counts
    return loss + {"none": extra, "sum": extra.sum(), "mean": extra.sum() / counts.sum()}[reduction]


def tensor_parallel(size: int) -> DeviceMesh:
    return mesh(1, size)["tensor_parallel"]


def assert_equal(value: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
