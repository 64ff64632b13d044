"""The cache of litgpt's models.

litgpt's own modules call it, so that whatever they do to queries, keys and values is done. It differs from litgpt's:
rows of a batch may be at different positions; keys and values are not repeated for the query heads that share them;
prompts may be longer than a sliding window; where scores are softcapped, a prompt does not see what comes later.
"""

from __future__ import annotations

from typing import Any

import torch
from litgpt.model import KVCache
from torch import Tensor, nn

from fabric_tp.architectures.cache import Cache
from fabric_tp.architectures.litgpt.lean import window_mask

SHORTEST = 64
"""Static shapes are for the next power of two of tokens, from here on, so that calls share what was compiled."""


class LitGPTCache(Cache):
    def prepare(self) -> None:
        gpt: Any = self.model
        needed = self.length - 1  # nothing follows the last token
        if needed > gpt.max_seq_length:
            raise ValueError(
                f"A prompt of {self.longest} tokens and max_new_tokens={self.length - self.longest} need {needed}"
                f" positions, and the model's max_seq_length is {gpt.max_seq_length}. Use fewer tokens"
                + (f"; it can be set to {gpt.config.block_size} at most." if _can_grow(gpt, needed) else ".")
            )
        self.slots = max(SHORTEST, 1 << (needed - 1).bit_length()) if self.static else max(needed, 1)
        self.blocks = list(gpt.transformer.h)
        self.attentions: list[Any] = [block.attn for block in self.blocks]
        self.windows = {_window(attention) for attention in self.attentions}
        self.masks: dict[int | None, Tensor] = {}
        self.before: list[tuple[type, Any]] = []

    def open(self) -> None:
        gpt: Any = self.model
        self.mask_cache, device = gpt.mask_cache, self.lengths.device
        gpt.mask_cache = torch.ones(1, 1, self.slots, 1, dtype=torch.bool, device=device)  # nobody reads it
        for attention in self.attentions:
            self.before.append((type(attention), attention.kv_cache))
            attention.kv_cache = KeysAndValues(len(self.prompts), self.slots, self.masks, _window(attention))
            attention.__class__ = _cached(type(attention))

    def prefill(self) -> tuple[Tensor, Tensor]:
        self.open()
        padded = nn.utils.rnn.pad_sequence(list(self.prompts), batch_first=True)
        self.positions, self.end = self.lengths[:, None], self.longest
        return self.call(padded, torch.arange(self.longest, device=padded.device)), self.lengths - 1

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.end += 1
        self._make_masks(self.slots if self.static else self.end)
        logits = self.call(tokens[:, None], self.positions)
        self.positions = self.positions + 1
        return logits, torch.zeros_like(tokens)

    def _make_masks(self, slots: int) -> None:
        """Of each kind of layer, ``(b, 1, 1, slots)``: 0 where a row's token sees a slot, -inf elsewhere."""
        slot, position = torch.arange(slots, device=self.positions.device), self.positions[:, None, None]
        for window in self.windows:
            hidden = slot > position
            if window is not None:
                hidden = hidden | (slot <= position - window)
            mask = torch.zeros(hidden.shape, dtype=self.attentions[0].kv_cache.k.dtype, device=hidden.device)
            self.masks[window] = mask.masked_fill_(hidden, float("-inf"))

    def close(self) -> None:
        for attention, (own, kv_cache) in zip(self.attentions, self.before, strict=False):
            attention.__class__ = own
            del attention._modules["kv_cache"]
            attention.kv_cache = kv_cache
        if self.before:
            self.model.mask_cache = self.mask_cache


class KeysAndValues(KVCache):
    """Of one layer and this rank's heads: a slot for each position of each row.

    A prompt fills the first slots of its row. What fills up shorter prompts gets slots too, which nobody sees before
    the row's own tokens have taken their place.

    Args:
        rows: Of the batch.
        slots: Positions of each.
        masks: What is visible in this step, by the width of a layer's window.
        window: How many positions this layer sees; None for all.
    """

    def __init__(self, rows: int, slots: int, masks: dict[int | None, Tensor], window: int | None) -> None:
        nn.Module.__init__(self)
        self.rows, self.slots, self.masks, self.window = rows, slots, masks, window

    def forward(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values ``(b, heads, t, d)``: of a prompt if the positions are ``(t,)``, of one token each if
        they are ``(b, 1)``. Returns the same."""
        if input_pos.dim() == 1:
            for name, new in {"k": k, "v": v}.items():
                kept = new.new_zeros(self.rows, new.shape[1], self.slots, new.shape[3])
                kept[:, :, : new.shape[2]] = new
                self.register_buffer(name, kept, persistent=False)
        else:
            row = torch.arange(k.shape[0], device=k.device)
            self.k[row, :, input_pos[:, 0]] = k[:, :, 0]
            self.v[row, :, input_pos[:, 0]] = v[:, :, 0]
        return k, v


class CachedAttention(nn.Module):
    """Attends to the cache; mixed into litgpt's attention modules while it is there."""

    kv_cache: KeysAndValues

    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Of ``q`` ``(b, n, t, d)`` to what the cache holds; ``k`` and ``v`` are the new ones. The whole prompt, or one
        token, of which the query heads that share a key stand in for so many tokens."""
        cache, attend = self.kv_cache, super().scaled_dot_product_attention  # type: ignore[misc]
        if not cache.masks:
            prompt = None if cache.window is None else window_mask(q.shape[2], cache.window, q.dtype, q.device)
            return attend(q, k, v, prompt)
        mask = cache.masks[cache.window].to(q.dtype)
        k, v = cache.k[:, :, : mask.shape[-1]], cache.v[:, :, : mask.shape[-1]]
        y = attend(q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]), k, v, mask)
        return y.transpose(1, 2).reshape(y.shape[0], 1, q.shape[1], -1)


_classes: dict[type, type] = {}


def _cached(cls: type) -> type:
    if cls not in _classes:
        _classes[cls] = type(f"Cached[{cls.__name__}]", (CachedAttention, cls), {"__module__": cls.__module__})
    return _classes[cls]


def _window(attention: Any) -> int | None:
    slides = getattr(attention, "apply_sliding_window_attention", False)
    return attention.config.sliding_window_size if slides else None


def _can_grow(gpt: Any, needed: int) -> bool:
    return needed <= gpt.config.block_size
