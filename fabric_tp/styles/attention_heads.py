"""Which heads a rank computes, and the attention module that computes with them."""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Group, Layout
from fabric_tp.styles.layout import enter_sharded
from fabric_tp.styles.prepare_input import PrepareInput
from fabric_tp.styles.style import LocalModule, Parallelized

HEADS = "query heads"


@dataclass(frozen=True)
class Heads:
    """Query heads and the key and value heads that groups of them share, over the tensor-parallel ranks.

    Query heads are split evenly and in order. Key and value heads are split too if the number of ranks divides theirs.
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

    def splits_key_value(self, size: int) -> bool:
        return self.key_value % size == 0

    def local_query(self, size: int) -> int:
        return self.query // size

    def group_size(self, size: int) -> int:
        """Query heads to each key and value head on a rank."""
        per_group = self.query // self.key_value
        return per_group if self.splits_key_value(size) else math.gcd(per_group, self.local_query(size))

    def local_key_value(self, size: int) -> int:
        return self.local_query(size) // self.group_size(size)

    def key_value_heads(self, size: int, rank: int) -> list[int]:
        """The key and value heads of a rank, in the order in which its query heads need them."""
        first = rank * self.local_query(size)
        starts = range(first, first + self.local_query(size), self.group_size(size))
        return [start // (self.query // self.key_value) for start in starts]

    def select(self, rows: Tensor, group: Group) -> Tensor:
        """The rows of this rank's key and value heads, of the rows of all."""
        chosen = self.key_value_heads(group.size, group.rank)
        by_head = rows.unflatten(0, (self.key_value, -1))
        if chosen == list(range(chosen[0], chosen[-1] + 1)):
            return by_head[chosen[0] : chosen[-1] + 1].flatten(0, 1)
        return by_head[torch.tensor(chosen, device=rows.device)].flatten(0, 1)


class HeadsModule(LocalModule):
    key_value_position: int | None = None
    """Where among the forward's arguments that is of which keys and values are made, if it is not the first."""

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        this, at = self.parallelized, self.key_value_position
        if at is None:
            return super().compute(*args, **kwargs)
        if at < len(args):
            args = (*args[:at], self._entered(args[at]), *args[at + 1 :])
        elif (name := this.style.key_value_input) in kwargs:
            kwargs[name] = self._entered(kwargs[name])
        return super().compute(*args, **kwargs)

    def _entered(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else enter_sharded(self.parallelized, x, "replicate")


class ShardHeads(PrepareInput):
    """An attention module that computes with this rank's heads only.

    Args:
        heads: Of the module. The number of ranks must divide the query heads.
        input_layout: As in :class:`PrepareInput`.
        query_counts: The attributes that count query heads, as paths from the module (``"n_heads"``,
            ``"config.n_head"``). An object on the way, such as a shared config, is copied and never changed.
        key_value_counts: The attributes that count key and value heads.
        group_sizes: The attributes that count query heads to each key and value head.
        head_features: The attributes that count the features of all query heads.
        per_query_head: Parameters of the module itself that have a number for each query head.
        key_value_input: The argument of the forward that keys and values are made of where that is not its first: of
            cross attention, to what an encoder made. It is whole on every rank, and so is its gradient; if it is not
            given, nothing happens.
        regather: As in :class:`Colwise`.

    ===============  ===========  =========  ==========  ==========================  ==========
    input_layout     x            inside     forward     backward                    gradient
    ===============  ===========  =========  ==========  ==========================  ==========
    ``"replicate"``  (b, s, h)    (b, s, h)              all-reduce
    ``"sequence"``   (b, s/t, h)  (b, s, h)  all-gather  all-gather, reduce-scatter
    ``None``         (b, s, h)    (b, s, h)                                          partial: x
    ===============  ===========  =========  ==========  ==========================  ==========

    Raises:
        ValueError: The number of ranks does not divide the query heads.

    Example::

        plan = {
            "attention": ShardHeads(Heads(8, 8), query_counts=["n_heads"]),
            "attention.qkv": FusedColwise({"q": 512, "k": 512, "v": 512}, None),
            "attention.out": Rowwise(),
        }
    """

    module_class = HeadsModule

    def __init__(
        self,
        heads: Heads,
        input_layout: Layout | None = "replicate",
        *,
        query_counts: Sequence[str] = (),
        key_value_counts: Sequence[str] = (),
        group_sizes: Sequence[str] = (),
        head_features: Sequence[str] = (),
        per_query_head: Sequence[str] = (),
        key_value_input: str = "",
        regather: bool = True,
    ) -> None:
        super().__init__(input_layout, regather=regather)
        self.heads = heads
        self.query_counts, self.key_value_counts, self.group_sizes = query_counts, key_value_counts, group_sizes
        self.head_features, self.per_query_head = head_features, per_query_head
        self.key_value_input = key_value_input

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Shard(0) for name in self.per_query_head}

    def divided(self, module: nn.Module) -> Mapping[str, int]:
        return {HEADS: self.heads.query}

    def validate(self, module: nn.Module) -> None:
        if self.key_value_input and self.key_value_input not in inspect.signature(module.forward).parameters:
            raise ValueError(f"The forward of this {type(module).__name__} takes no {self.key_value_input!r}.")

    def prepare(self, module: nn.Module, this: Parallelized) -> None:
        if self.key_value_input:
            names = list(inspect.signature(module.forward).parameters)
            module.key_value_position = names.index(self.key_value_input)  # type: ignore[assignment]
        size = this.group.size
        local = dict.fromkeys(self.query_counts, self.heads.local_query(size))
        local |= dict.fromkeys(self.key_value_counts, self.heads.local_key_value(size))
        local |= dict.fromkeys(self.group_sizes, self.heads.group_size(size))
        local |= {path: operator.attrgetter(path)(module) // size for path in self.head_features}
        set_attributes(module, local)


def set_attributes(module: nn.Module, values: Mapping[str, object]) -> None:
    """Set attributes by path; what holds them, other than the module, is copied first."""
    for owner in sorted({path.rpartition(".")[0] for path in values} - {""}):
        parent, _, name = owner.rpartition(".")
        holder = operator.attrgetter(parent)(module) if parent else module
        setattr(holder, name, copy.copy(getattr(holder, name)))
    for path, value in values.items():
        owner, _, name = path.rpartition(".")
        setattr(operator.attrgetter(owner)(module) if owner else module, name, value)
