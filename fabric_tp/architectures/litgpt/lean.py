"""litgpt's modules, the same but for what they keep for the backward; see :mod:`fabric_tp.lean`."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import litgpt
import torch
import torch.nn.functional as F
from litgpt import lora
from litgpt.model import CausalSelfAttention, GemmaMLP, GptNeoxMLP, LLaMAMLP, RMSNorm
from torch import Tensor, nn

from fabric_tp import _torch
from fabric_tp.architectures.lean import Table
from fabric_tp.autograd.activations import activated, gated
from fabric_tp.autograd.linear import linear
from fabric_tp.autograd.norms import rms_norm
from fabric_tp.autograd.recompute import recomputed_by_compiler


class LeanRMSNorm(nn.Module):
    weight: Tensor
    eps: float
    dim: int
    add_unit_offset: bool

    def forward(self, x: Tensor) -> Tensor:
        if self.dim not in (-1, x.dim() - 1):
            return super().forward(x)  # type: ignore[misc]
        return rms_norm(x, self.weight, self.eps, unit_offset=self.add_unit_offset)


class LeanGptNeoxMLP(nn.Module):
    fc: nn.Module
    proj: nn.Module
    config: litgpt.Config

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(activated(self.fc(x), _gelu(self.config)))


class LeanLLaMAMLP(nn.Module):
    fc_1: nn.Module
    fc_2: nn.Module
    proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(gated(self.fc_1(x), self.fc_2(x), "silu"))


class LeanGemmaMLP(LeanLLaMAMLP):
    config: litgpt.Config

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(gated(self.fc_1(x), self.fc_2(x), _gelu(self.config)))


def _gelu(config: litgpt.Config) -> Any:
    return {"none": "gelu", "tanh": "gelu_tanh"}[config.gelu_approximate]


class LeanAttention(nn.Module):
    """Keeps each key and value head once, nothing of the fused projection, and one mask for all layers."""

    config: litgpt.Config
    mscale: float
    apply_sliding_window_attention: bool
    lean_shared: MutableMapping[str, Any]
    slides = False
    """The mask is left to :meth:`scaled_dot_product_attention`."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any = None, input_pos: Any = None, *rest: Any
    ) -> Tensor:
        if input_pos is not None or not self.apply_sliding_window_attention or torch.compiler.is_compiling():
            return super().forward(x, cos, sin, mask, input_pos, *rest)  # type: ignore[misc]
        self.apply_sliding_window_attention, self.slides = False, True
        try:
            return super().forward(x, cos, sin, mask, input_pos, *rest)  # type: ignore[misc]
        finally:
            self.apply_sliding_window_attention, self.slides = True, False

    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Of ``q`` ``(b, heads, s, d)`` and ``k`` and ``v`` of as many heads: those of a group are the same."""
        if self.slides:
            mask = self._window(q)
        elif torch.compiler.is_compiling() and self.apply_sliding_window_attention and torch.is_grad_enabled():
            # The module's own, now unused, is never made.
            mask = recomputed_by_compiler(window_mask, *self._window_of(q))
        capped = self.config.attention_logit_softcapping is not None
        if mask is not None or capped or not torch.is_grad_enabled() or k.shape[1] != q.shape[1]:
            return super().scaled_dot_product_attention(q, k, v, mask)  # type: ignore[misc]
        assert self.config.n_query_groups is not None
        group = self.config.n_head // self.config.n_query_groups
        if group > 1 and _torch.flash_attention_takes_groups(q, k[:, ::group], v[:, ::group]):
            k, v = _copy(k[:, ::group]), _copy(v[:, ::group])
        elif group == 1:
            v = _copy(v)  # a view of queries, keys and values before their rotation
        scale = 1.0 / math.sqrt(self.config.attention_scores_scalar or self.config.head_size)  # type: ignore[arg-type]
        scale = scale * self.mscale * self.mscale
        # The output lies in memory as the queries do: with a position's heads side by side it needs no copy afterwards.
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] < q.shape[1])
        return y.transpose(1, 2)

    def _window(self, q: Tensor) -> Tensor:
        key = self._window_of(q)
        if self.lean_shared.get("window") != key:
            self.lean_shared.update(window=key, mask=window_mask(*key))
        return self.lean_shared["mask"]

    def _window_of(self, q: Tensor) -> tuple[int, int, torch.dtype, torch.device]:
        assert self.config.sliding_window_size is not None
        return q.shape[2], self.config.sliding_window_size, q.dtype, q.device


class LeanLoRALinear(nn.Module):
    """Of the input, which its first matrix needs for its gradient, it keeps nothing that can be recomputed."""

    linear: nn.Module
    lora_dropout: Callable[[Tensor], Tensor]
    lora_A: Tensor
    lora_B: Tensor
    r: int
    scaling: float
    merged: bool

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.r == 0 or self.merged:
            return y
        down = linear(self.lora_dropout(x), [self.lora_A])
        return y + (down @ self.lora_B.transpose(0, 1)) * self.scaling


class LeanLoRAQKVLinear(LeanLoRALinear):
    enable_lora: Sequence[bool]
    conv1d: Callable[[Tensor, Tensor], Tensor]
    zero_pad: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.r == 0 or not any(self.enable_lora) or self.merged:
            return y
        down = linear(self.lora_dropout(x), [self.lora_A])
        up = self.conv1d(down.transpose(-2, -1), self.lora_B.unsqueeze(-1)).transpose(-2, -1)
        return y + self.zero_pad(up) * self.scaling


def _copy(x: Tensor) -> Tensor:
    """In memory of its own, even where ``x`` looks contiguous in that of something larger."""
    return x.clone(memory_format=torch.contiguous_format)


def window_mask(length: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(1, 1, length, length)``: 0 where a position sees another one, the last ``window`` and itself among them."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    mask = torch.zeros(length, length, dtype=dtype, device=device)
    return mask.masked_fill_((distance < 0) | (distance >= window), float("-inf")).view(1, 1, length, length)


LEAN: Table = {
    RMSNorm.forward: LeanRMSNorm,
    GptNeoxMLP.forward: LeanGptNeoxMLP,
    LLaMAMLP.forward: LeanLLaMAMLP,
    GemmaMLP.forward: LeanGemmaMLP,
    lora.GemmaMLP.forward: LeanGemmaMLP,
    lora.LoRALinear.forward: LeanLoRALinear,
    lora.LoRAQKVLinear.forward: LeanLoRAQKVLinear,
    CausalSelfAttention.forward: LeanAttention,
}
