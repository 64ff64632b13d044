from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.layout import leave_sharded, leaving
from fabric_tp.styles.low_rank_colwise import UP, low_rank_placements
from fabric_tp.styles.parameters import own_parameters
from fabric_tp.styles.style import Parallelized, Style


class LowRankRowwise(Style):
    """A low-rank adapter around a :class:`Rowwise` layer: one reduction for both, and B is fed a part of the sum.

    The layer leaves a partial sum (``Rowwise(None)``).

    Args:
        output_layout: As in :class:`Rowwise`.
        heads: As in :class:`Rowwise`.

    ===============  ===========  ========  ======  =================  ==============  ==========  ===============
    output_layout    x            lora_A    lora_B  y                  forward         backward    gradient
    ===============  ===========  ========  ======  =================  ==============  ==========  ===============
    ``"replicate"``  (b, s, f/t)  (r, f/t)  (h, r)  (b, s, h)          all-reduce                  partial: lora_B
    ``"sequence"``   (b, s, f/t)  (r, f/t)  (h, r)  (b, s/t, h)        reduce-scatter  all-gather  partial: lora_B
    ``None``         (b, s, f/t)  (r, f/t)  (h, r)  (b, s, h) partial                              partial: lora_B
    ===============  ===========  ========  ======  =================  ==============  ==========  ===============

    Raises:
        ValueError: The number of ranks does not divide the input features.

    Example::

        plan = {"mlp.down": LowRankRowwise(), "mlp.down.linear": Rowwise(None)}
    """

    def __init__(self, output_layout: Layout | None = "replicate", *, heads: Heads | None = None) -> None:
        self.output_layout = output_layout
        self.heads = self.uncut = heads

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return low_rank_placements(module, down=Shard(1), up=Replicate())

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset({UP} & set(own_parameters(module)))

    def leave(self, this: Parallelized, y: Tensor) -> Tensor:
        return leave_sharded(this, y, self.output_layout)

    def collectives(self) -> tuple[str, str]:
        return leaving(self.output_layout)
