from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.styles.collectives import all_reduce
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.recompute import reduction
from fabric_tp.styles.style import LocalModule, Style, own_parameters

EPSILON = ("eps", "variance_epsilon")


class _AllHeadsNorm(LocalModule):
    def localize(self, name: str, local: Tensor) -> Tensor:
        style = self.parallelized.style
        assert isinstance(style, AllHeadsNorm)
        return style.shared.select(local, self.parallelized.group) if style.shared else local

    def compute(self, x: Tensor) -> Tensor:
        style, group = self.parallelized.style, self.parallelized.group
        assert isinstance(style, AllHeadsNorm)
        weight = self.weight
        assert isinstance(weight, Tensor)
        epsilon: float = next(getattr(self, name) for name in EPSILON if hasattr(self, name))
        exact = x.float() if x.dtype != torch.float64 else x
        squares = exact.square()
        if style.shared:
            squares = squares * style.shares(group.size, group.rank, x.shape[-1]).to(squares)
        mean = reduction(partial(all_reduce, squares.sum(-1, keepdim=True), group)) / style.features
        scale = weight + 1 if getattr(self, "add_unit_offset", False) else weight
        return (exact * torch.rsqrt(mean + epsilon) * scale.to(exact.dtype)).to(x.dtype)


class AllHeadsNorm(Style):
    """An RMSNorm over the features of all heads together, of which each rank has some (OLMo 2).

    The mean square is summed over the ranks, forward and backward; everything else is local.

    Args:
        features: Of all heads together.
        shared: The heads, if these are keys of fewer heads than there are ranks (:class:`SharedHeads`).

    ===============  ==========  ===============  ==================  ==================
    x                weight      y                forward             backward
    ===============  ==========  ===============  ==================  ==================
    (b, s, f/t)      (f/t,)      (b, s, f/t)      all-reduce (b, s)   all-reduce (b, s)
    ===============  ==========  ===============  ==================  ==================
    """

    module_class = _AllHeadsNorm

    def __init__(self, features: int, *, shared: Heads | None = None) -> None:
        self.features = features
        self.shared = shared

    def validate(self, module: nn.Module) -> None:
        if list(own_parameters(module)) != ["weight"] or not any(hasattr(module, name) for name in EPSILON):
            raise ValueError(f"AllHeadsNorm takes an RMSNorm with a weight, and this is a {type(module).__name__}.")

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {"weight": Replicate() if self.shared else Shard(0)}

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset({"weight"} if self.shared else ())

    def shares(self, size: int, rank: int, features: int) -> Tensor:
        """For each feature of a rank, the part of its head that is this rank's to count: heads are on several ranks."""
        assert self.shared is not None
        copies = [head for other in range(size) for head in self.shared.key_value_heads(size, other)]
        mine = self.shared.key_value_heads(size, rank)
        return torch.tensor([1 / copies.count(head) for head in mine]).repeat_interleave(features // len(mine))

    def collectives(self) -> tuple[str, str]:
        return "all-reduce", "all-reduce"
