"""Low-rank adapters (LoRA, Hu et al. 2021) around a linear layer: A and B are split as their base layer is.

The base layer is a child with a style of its own, which leaves input and output to the adapter around it. One of A and
B is whole on every rank, and its gradient partial: A around a column-wise layer, where each rank uses it for its own
rows, and B around a row-wise one, where each rank feeds it a part of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.parameters import own_parameters

DOWN, UP = "lora_A", "lora_B"


class LowRankColwise(Colwise):
    """A low-rank adapter around a :class:`Colwise` layer; each rank uses all of A for its own rows of B.

    The adapter keeps the gathered input for the gradient of A, so that nothing is gathered again in the backward.

    Args:
        input_layout: As in :class:`Colwise`.
        heads: As in :class:`Colwise`.

    ===============  ===========  ======  ========  ===========  ==========  ==============  ==================
    input_layout     x            lora_A  lora_B    y            forward     backward        gradient
    ===============  ===========  ======  ========  ===========  ==========  ==============  ==================
    ``"replicate"``  (b, s, h)    (r, h)  (f/t, r)  (b, s, f/t)              all-reduce      partial: lora_A
    ``"sequence"``   (b, s/t, h)  (r, h)  (f/t, r)  (b, s, f/t)  all-gather  reduce-scatter  partial: lora_A
    ``None``         (b, s, h)    (r, h)  (f/t, r)  (b, s, f/t)                              partial: x, lora_A
    ===============  ===========  ======  ========  ===========  ==========  ==============  ==================

    Raises:
        ValueError: The number of ranks does not divide the output features.

    Example::

        plan = {"mlp.up": LowRankColwise(), "mlp.up.linear": Colwise(None)}
    """

    def __init__(self, input_layout: Layout | None = "replicate", *, heads: Heads | None = None) -> None:
        super().__init__(input_layout, regather=False, heads=heads)

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return low_rank_placements(module, down=Replicate(), up=Shard(0))

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset({DOWN} & set(own_parameters(module)))


def low_rank_placements(module: nn.Module, *, down: Placement, up: Placement) -> dict[str, Placement]:
    places = {DOWN: down, UP: up}
    return {name: places[name] for name in own_parameters(module) if name in places}
