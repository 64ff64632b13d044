"""Modules that compute what torch's own norms compute and keep less for the backward; families add theirs.

Nothing here knows about ranks. A table says which forward is replaced by what is exactly equivalent to it; a subclass
with a forward of its own keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fabric_tp.autograd.norms import layer_norm, rms_norm

Table = Mapping[Callable[..., Tensor], type[nn.Module]]
"""From a module's forward to a class to compute with instead, whose forward may use ``super().forward``."""


class LeanLayerNorm(nn.Module):
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LeanRMSNorm(nn.Module):
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    eps: float | None

    def forward(self, x: Tensor) -> Tensor:
        if self.eps is None or len(self.normalized_shape) > 1 or x.dtype == torch.float64:
            return super().forward(x)  # type: ignore[misc]
        return rms_norm(x, self.weight, self.eps)


TORCH: Table = {nn.LayerNorm.forward: LeanLayerNorm, nn.RMSNorm.forward: LeanRMSNorm}
