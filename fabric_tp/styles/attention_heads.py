"""Which heads a rank computes, and the attention module that computes with them."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Layout
from fabric_tp.autograd.collectives import copy as copy_to_ranks
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.layout import enter_sharded
from fabric_tp.styles.prepare_input import PrepareInput
from fabric_tp.styles.stand_in import stand_in
from fabric_tp.styles.style import LocalModule, Parallelized


class HeadsModule(LocalModule):
    """Gives its own forward what this rank needs of arguments other than the first."""

    parallelized: Parallelized[ShardHeads]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        this = self.parallelized
        for name in this.style.same_input:
            first, other = (argument(this, each, args, kwargs) for each in (this.arguments[0], name))
            if other is not first:
                raise ValueError(
                    f"{name} is other activations than {this.arguments[0]}, to which this {type(self).__name__} attends"
                    " with the heads of one rank. fabric_tp.from_plan() takes a plan for it."
                )
        return super().forward(*args, **kwargs)

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        this, given = self.parallelized, list(args)
        for name, value in self._changed(args, kwargs).items():
            position = this.arguments.index(name) if name in this.arguments else len(args)
            if position < len(args):
                given[position] = value
            elif name in kwargs:
                kwargs[name] = value
        return super().compute(*given, **kwargs)

    def _changed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        this, style = self.parallelized, self.parallelized.style
        changed: dict[str, Any] = {}
        if style.measures_input or style.same_input:
            first = argument(this, this.arguments[0], args, kwargs)
            if style.measures_input:
                first = stand_in(first, style.heads.local_features(first.shape[-1], this.group.size))
            changed = dict.fromkeys((this.arguments[0], *style.same_input), first)
        for name in style.per_head_arguments:
            changed[name] = style.own_heads(this, argument(this, name, args, kwargs))
        if name := style.key_value_input:
            other = argument(this, name, args, kwargs)
            changed[name] = None if other is None else enter_sharded(this, other, "replicate")
        return changed


def argument(this: Parallelized, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call gives for this parameter of the forward, by position or by name; None if nothing."""
    position = this.arguments.index(name) if name in this.arguments else len(args)
    return args[position] if position < len(args) else kwargs.get(name)


class ShardHeads(PrepareInput):
    """An attention module that computes with this rank's heads only.

    Args:
        heads: Of the module.
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
        per_head_arguments: Arguments with numbers for each query head, (..., n, s, s) or (b * n, s, s) and whole on
            every rank, such as ALiBi's biases. One with another size in that place is for all heads alike. If it has a
            gradient, that is summed over the ranks.
        measures_input: Its forward takes the number of features of all query heads from the width of its input. So it
            is given a stand-in as wide as this rank's heads, in whose place its column-wise layers take the input.
        same_input: Arguments that are given the same tensor as the first, and get the same as it.
        returned: Parameters of the module itself that it returns, for what lies as ``returned_layout``.
        returned_layout: As ``output_layout`` of :class:`Rowwise`.
        regather: As in :class:`Colwise`.

    ===============  ===========  =========  ==========  ==========================  ==========
    input_layout     x            inside     forward     backward                    gradient
    ===============  ===========  =========  ==========  ==========================  ==========
    ``"replicate"``  (b, s, h)    (b, s, h)              all-reduce
    ``"sequence"``   (b, s/t, h)  (b, s, h)  all-gather  all-gather, reduce-scatter
    ``None``         (b, s, h)    (b, s, h)                                          partial: x
    ===============  ===========  =========  ==========  ==========================  ==========

    Raises:
        ValueError: An argument of ``same_input`` is another tensor.

    Example::

        plan = {
            "attention": ShardHeads(Heads(8, 8), query_counts=["n_heads"]),
            "attention.qkv": FusedColwise({"q": 512, "k": 512, "v": 512}, None),
            "attention.out": Rowwise(),
        }
    """

    module_class: ClassVar[type[LocalModule]] = HeadsModule

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
        per_head_arguments: Sequence[str] = (),
        measures_input: bool = False,
        same_input: Sequence[str] = (),
        returned: Sequence[str] = (),
        returned_layout: Layout = "replicate",
        regather: bool = True,
    ) -> None:
        super().__init__(input_layout, regather=regather)
        self.heads = self.uncut = heads
        self.query_counts, self.key_value_counts, self.group_sizes = query_counts, key_value_counts, group_sizes
        self.head_features, self.per_query_head = head_features, per_query_head
        self.key_value_input = key_value_input
        self.per_head_arguments = per_head_arguments
        self.measures_input, self.same_input = measures_input, same_input
        self.returned, self.returned_layout = returned, returned_layout

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Shard(0) for name in self.per_query_head} | {name: Replicate() for name in self.returned}

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset(self.returned if self.returned_layout == "sequence" else ())

    def own_heads(self, this: Parallelized, of_all: Any) -> Any:
        """The numbers of this rank's heads, of a tensor with those of all heads."""
        if this.group.size == 1 or not isinstance(of_all, Tensor) or of_all.dim() < 3:
            return of_all
        if of_all.shape[-3] % self.heads.query:
            return of_all
        by_head = copy_to_ranks(of_all, this.group).unflatten(-3, (-1, self.heads.query))
        return self.heads.own(by_head, this.group, -3).flatten(-4, -3)

    def validate(self, module: nn.Module) -> None:
        if self.key_value_input and self.key_value_input not in inspect.signature(module.forward).parameters:
            raise ValueError(f"The forward of this {type(module).__name__} takes no {self.key_value_input!r}.")

    def prepare(self, module: nn.Module, this: Parallelized) -> None:
        size = this.group.size
        local = dict.fromkeys(self.query_counts, self.heads.local_query(size))
        local |= dict.fromkeys(self.key_value_counts, self.heads.local_key_value(size))
        local |= dict.fromkeys(self.group_sizes, self.heads.group_size(size))
        local |= {
            path: self.heads.local_features(operator.attrgetter(path)(module), size) for path in self.head_features
        }
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
