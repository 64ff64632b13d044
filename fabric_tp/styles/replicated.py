from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.style import Style, own_parameters


class Replicated(Style):
    """A module that every rank holds whole: norms, mostly.

    Args:
        layout: How its input and output lie. ``"sequence"``: each rank computes on its own part of the sequence, so
            the gradients of the parameters are partial sums. ``"replicate"``: all ranks compute the same.
        partial_gradient: All ranks compute the same, but what follows is sharded, so that the gradients are partial
            sums anyway: norms of single heads, routers, low-rank compressions.

    ===============  ===========  =============  ========
    layout           parameters   x, y           gradient
    ===============  ===========  =============  ========
    ``"replicate"``  whole        (b, s, h)      the same on each rank
    ``"sequence"``   whole        (b, s/t, h)    summed over ranks once a step
    ===============  ===========  =============  ========
    """

    def __init__(self, layout: Layout = "replicate", *, partial_gradient: bool = False) -> None:
        self.layout = layout
        self.partial_gradient = partial_gradient or layout == "sequence"

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Replicate() for name in own_parameters(module)}

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset(own_parameters(module)) if self.partial_gradient else frozenset()

    def collectives(self) -> tuple[str, str]:
        return "", "(in the bucket)" if self.partial_gradient else ""
