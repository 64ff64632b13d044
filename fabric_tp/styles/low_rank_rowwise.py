from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.layout import leave_sharded, leaving
from fabric_tp.styles.low_rank_colwise import UP, low_rank_placements
from fabric_tp.styles.style import Parallelized, Style, own_parameters


class LowRankRowwise(Style):
    """Around a :class:`Rowwise` layer with ``output_layout=None``: one reduction for base and adapter together."""

    def __init__(self, output_layout: Layout | None = "replicate") -> None:
        self.output_layout = output_layout

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return low_rank_placements(module, down=Shard(1), up=Replicate())

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset({UP} & set(own_parameters(module)))

    def leave(self, this: Parallelized, y: Tensor) -> Tensor:
        return leave_sharded(this, y, self.output_layout)

    def collectives(self) -> tuple[str, str]:
        return leaving(self.output_layout)
