"""The options of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Reduction = Literal["mean", "sum", "none"]

CHUNK_SIZE = 1024
"""Rows whose logits exist at a time: so many that computing matrix products takes longer than reading the weight."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What :func:`fabric_tp.cross_entropy` and :func:`fabric_tp.linear_cross_entropy` document.

    Raises:
        ValueError: A value is not known or out of range.
    """

    ignore_index: int
    label_smoothing: float
    z_loss: float
    reduction: Reduction
    softcap: float | None = None
    """Of logits that are computed; logits that exist come softcapped."""
    chunk_size: int = CHUNK_SIZE
    """In rows; of logits that are computed."""

    def __post_init__(self) -> None:
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction={self.reduction!r} is not known; it must be 'mean', 'sum' or 'none'.")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 1].")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size} must be at least 1.")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap} must be positive.")

    def of_sum(self, total: Tensor, targets: Tensor) -> Tensor:
        """The ``reduction``, which is not ``"none"``, of losses whose sum is ``total``."""
        return total / (targets != self.ignore_index).sum() if self.reduction == "mean" else total
