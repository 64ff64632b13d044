"""Which heads a rank computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fabric_tp.autograd.collectives import Group, whole_blocks


@dataclass(frozen=True)
class Heads:
    """Query heads and the key and value heads that groups of them share, over the tensor-parallel ranks.

    Query heads are split in order, ``ceil(n / t)`` on each rank. Where the ranks do not divide them, the last ranks
    have fewer or none, and compute heads of zeros in their place: so all ranks do the same, and no rank more than the
    first.

    Key and value heads are split in the same way if there are as many of them or the number of ranks divides theirs.
    Otherwise each rank takes those that its query heads need: each as often as it takes for all groups on the rank to
    have the same size, which is once unless groups straddle ranks.

    Args:
        query: Query heads of the whole module.
        key_value: Key and value heads of the whole module.

    Example::

        heads = Heads(query=8, key_value=2)
        assert [heads.key_value_heads(4, rank) for rank in range(4)] == [[0], [0], [1], [1]]
    """

    query: int
    key_value: int

    def splits_evenly(self, size: int) -> bool:
        return self.query % size == 0

    def splits_key_value(self, size: int) -> bool:
        return self.key_value % size == 0 or self.key_value == self.query

    def local_query(self, size: int) -> int:
        return -(-self.query // size)

    def group_size(self, size: int) -> int:
        """Query heads to each key and value head on a rank."""
        per_group = self.query // self.key_value
        return per_group if self.splits_key_value(size) else math.gcd(per_group, self.local_query(size))

    def local_key_value(self, size: int) -> int:
        return self.local_query(size) // self.group_size(size)

    def local_features(self, features: int, size: int) -> int:
        """Of the features of all query heads, those that a rank computes."""
        return features // self.query * self.local_query(size)

    def key_value_heads(self, size: int, rank: int) -> list[int]:
        """The key and value heads of a rank, in the order in which its query heads need them."""
        first = rank * self.local_query(size)
        starts = range(first, first + self.local_query(size), self.group_size(size))
        return [min(start // (self.query // self.key_value), self.key_value - 1) for start in starts]

    def select(self, whole: Tensor, group: Group, dim: int = 0) -> Tensor:
        """The features of this rank's key and value heads, of those of all, which lie along ``dim``."""
        chosen = self.key_value_heads(group.size, group.rank)
        by_head = whole.unflatten(dim, (self.key_value, -1))
        if chosen == list(range(chosen[0], chosen[-1] + 1)):
            return by_head.narrow(dim, chosen[0], len(chosen)).flatten(dim, dim + 1)
        return by_head.index_select(dim, torch.tensor(chosen, device=whole.device)).flatten(dim, dim + 1)

    def own(self, of_all: Tensor, group: Group, dim: int) -> Tensor:
        """What belongs to this rank's query heads, of a tensor that has something for each head along ``dim``."""
        count = self.local_query(group.size)
        first = min(group.rank * count, self.query)
        there = min(count, self.query - first)
        own = of_all.narrow(dim, first, there)
        if there == count:
            return own
        filled = list(own.shape)
        filled[dim] = count - there
        return torch.cat([own, own.new_zeros(filled)], dim)

    def complete(self, shard: Tensor, group: Group, dim: int, features: int) -> Tensor:
        """This rank's query heads, where it has the next ``ceil(features / t)`` of all features along ``dim``."""
        if self.splits_evenly(group.size):
            return shard
        return whole_blocks(shard, group, dim, features, self.query)
