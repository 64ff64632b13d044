"""Small modules for the styles, in the letters of their tables."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.styles.table import SIZES


def linear(before: str, after: str, bias: bool = True) -> nn.Linear:
    """From so many features to so many, by letter."""
    return nn.Linear(SIZES[before], SIZES[after], bias)


class Inside(nn.Module):
    """Linear layers from features to features, by letter, that remember what shape they see."""

    def __init__(self, *letters: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(linear(before, after) for before, after in pairwise(letters)))

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = tuple(hidden.shape)
        return self.layers(hidden)


class Attention(nn.Module):
    """Causal attention whose heads are its output."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads = SIZES["n"]
        self.q, self.k, self.v = (nn.Linear(SIZES["h"], SIZES["n"] * SIZES["d"]) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = tuple(hidden.shape)
        q, k, v = (each(hidden).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class LowRank(nn.Module):
    """A linear layer and a low-rank change of it."""

    def __init__(self, before: str, after: str) -> None:
        super().__init__()
        self.linear = linear(before, after)
        self.lora_A = nn.Parameter(torch.randn(SIZES["r"], SIZES[before]))
        self.lora_B = nn.Parameter(torch.randn(SIZES[after], SIZES["r"]))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) + hidden @ self.lora_A.T @ self.lora_B.T


class RMSNorm(nn.Module):
    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(features)), eps

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps) * self.weight
