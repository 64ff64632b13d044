"""Low-rank adapters (LoRA, Hu et al. 2021) around a linear layer: A and B are split as their base layer is.

The base layer is a child with a style of its own, which leaves input and output to the adapter around it.

==========  ============  ============  =========================================
base        A             B             partial gradients
==========  ============  ============  =========================================
column-wise (r, h)        (f/t, r)      of A: each rank uses it for its own rows
row-wise    (r, f/t)      (h, r)        of B: each rank feeds it a part of the sum
==========  ============  ============  =========================================
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.style import own_parameters

DOWN, UP = "lora_A", "lora_B"


class LowRankColwise(Colwise):
    """Around a :class:`Colwise` layer."""

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return low_rank_placements(module, down=Replicate(), up=Shard(0))

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset({DOWN} & set(own_parameters(module)))


def low_rank_placements(module: nn.Module, *, down: Placement, up: Placement) -> dict[str, Placement]:
    places = {DOWN: down, UP: up}
    return {name: places[name] for name in own_parameters(module) if name in places}
