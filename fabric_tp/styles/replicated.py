from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.styles.style import Layout, Style, own_parameters


class Replicated(Style):
    """A module that every rank holds whole: norms, mostly.

    Args:
        layout: How its input and output lie. ``"sequence"``: each rank computes on its own part of the sequence, so
            the gradients of the parameters are partial sums. ``"replicate"``: all ranks compute the same.

    ==============  ===========  =============  ========
    layout          parameters   x, y           gradient
    ==============  ===========  =============  ========
    ``"replicate"`` whole        (b, s, h)      the same on each rank
    ``"sequence"``  whole        (b, s/t, h)    summed over ranks once a step
    ==============  ===========  =============  ========
    """

    def __init__(self, layout: Layout = "replicate") -> None:
        self.layout = layout

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Replicate() for name in own_parameters(module)}

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset(own_parameters(module)) if self.layout == "sequence" else frozenset()

    def collectives(self) -> tuple[str, str]:
        return "", "(in the bucket)" if self.layout == "sequence" else ""
