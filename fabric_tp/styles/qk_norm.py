from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp import _torch
from fabric_tp.autograd.collectives import all_reduce
from fabric_tp.autograd.kept_reductions import reduction
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.parameters import own_parameters
from fabric_tp.styles.style import LocalModule, Parallelized, Style


class _AllHeadsNorm(LocalModule):
    parallelized: Parallelized[AllHeadsNorm]
    weight: Tensor

    def localize(self, name: str, local: Tensor) -> Tensor:
        shared = self.parallelized.style.shared
        return shared.select(local, self.parallelized.group) if shared else super().localize(name, local)

    def compute(self, x: Tensor) -> Tensor:
        style, group = self.parallelized.style, self.parallelized.group
        exact = x.float() if x.dtype != torch.float64 else x
        squares = exact.square()
        if style.shared:
            squares = squares * style.shares(group.size, group.rank, x.shape[-1]).to(squares)
        mean = reduction(partial(all_reduce, squares.sum(-1, keepdim=True), group)) / style.features
        return style.normalised(exact, mean, self.weight, style.epsilon_of(self)).to(x.dtype)


class AllHeadsNorm(Style):
    """An RMSNorm over the features of all heads together, of which each rank has some (OLMo 2).

    The mean square is summed over the ranks, forward and backward; everything else is local.

    Args:
        features: Of all heads together.
        shared: The heads, if these are keys of fewer heads than there are ranks (:class:`SharedHeads`).
        heads: As in :class:`Colwise`.
        epsilon: Added to the mean square; the module's ``eps`` by default.
        unit_offset: Multiply with ``1 + weight``.

    =========  =============  ======  =============  ====================  ====================  ==================
    shared     x              weight  y              forward               backward              gradient
    =========  =============  ======  =============  ====================  ====================  ==================
    ``None``   (b, s, f/t)    (f/t,)  (b, s, f/t)    all-reduce (b, s, 1)  all-reduce (b, s, 1)
    ``heads``  (b, s, k * d)  (f,)    (b, s, k * d)  all-reduce (b, s, 1)  all-reduce (b, s, 1)  partial: x, weight
    =========  =============  ======  =============  ====================  ====================  ==================

    Raises:
        ValueError: The module computes something else, or the number of ranks does not divide its features.

    Example::

        plan = {"attention.wq": Colwise(None), "attention.q_norm": AllHeadsNorm(4096)}
    """

    module_class = _AllHeadsNorm

    def __init__(
        self,
        features: int,
        *,
        shared: Heads | None = None,
        heads: Heads | None = None,
        epsilon: float | None = None,
        unit_offset: bool = False,
    ) -> None:
        self.features = features
        self.shared, self.heads, self.uncut = shared, heads, heads
        self.epsilon, self.unit_offset = epsilon, unit_offset

    def validate(self, module: nn.Module) -> None:
        if list(own_parameters(module)) != ["weight"] or not self._computes_what(module):
            raise ValueError(
                f"AllHeadsNorm takes an RMSNorm with a weight, with epsilon={self.epsilon} and"
                f" unit_offset={self.unit_offset}, and this {type(module).__name__} computes something else."
            )

    def epsilon_of(self, module: nn.Module) -> float:
        epsilon = self.epsilon if self.epsilon is not None else getattr(module, "eps", None)
        return torch.finfo(torch.float32).eps if epsilon is None else float(epsilon)

    def normalised(self, x: Tensor, mean_square: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = weight + 1 if self.unit_offset else weight
        return x * torch.rsqrt(mean_square + epsilon) * scale.to(x.dtype)

    def _computes_what(self, module: nn.Module) -> bool:
        """Whether the module's own forward gives what this style would, for a random weight and input.

        The input has a row whose mean square is next to nothing, where epsilon shows.
        """
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(3, self.features, generator=generator, dtype=torch.float32, device="cpu")
        if _torch.is_fake(values):
            return True
        values[2] *= 1e-3
        weight, x = values[0], values[1:]
        probe = copy.copy(module)
        probe._parameters = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
        expected = self.normalised(x, x.square().mean(-1, keepdim=True), weight, self.epsilon_of(module))
        return torch.allclose(probe(x), expected, rtol=1e-4, atol=1e-5)

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
