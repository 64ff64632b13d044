"""How many heads an attention module has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class HeadCounts:
    query: int
    key_value: int
    size: int
    """Features of one head."""

    @property
    def qkv(self) -> dict[str, int]:
        """Features of all queries, keys and values, as a fused layer has them for its parts."""
        keys = self.key_value * self.size
        return {"q": self.query * self.size, "k": keys, "v": keys}


@dataclass(frozen=True)
class AdaptedHeads:
    """A low-rank adapter around a fused layer to the heads. Attributes are its own."""

    changed: Callable[[nn.Module], tuple[str, ...]]
    """From the adapter to the parts that it changes: some of "q", "k" and "v"."""
    query_counts: tuple[str, ...] = ()
    key_value_counts: tuple[str, ...] = ()
    row_counts: tuple[str, ...] = ()
    """Attributes that list the rows of each part that it changes."""
    row_indices: tuple[str, ...] = ()
    """Buffers with the indices of the output features that it changes."""
