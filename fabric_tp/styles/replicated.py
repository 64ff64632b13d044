from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.parameters import own_parameters
from fabric_tp.styles.style import Style


class Replicated(Style):
    """A module that every rank holds whole: norms, mostly.

    Args:
        layout: How its input and output lie. ``"sequence"``: each rank computes on its own part of the sequence, so
            the gradients of the parameters are partial sums. ``"replicate"``: all ranks compute the same.
        partial_gradient: The gradients are partial sums anyway, since what follows is sharded, or what comes in is:
            norms of single heads, routers, low-rank compressions.

    Partial gradients are summed over the ranks once a step.

    ===============  ================  ==============  ======  ==============  =======  ========  ===============
    layout           partial_gradient  x               weight  y               forward  backward  gradient
    ===============  ================  ==============  ======  ==============  =======  ========  ===============
    ``"replicate"``  ``False``         (b, s, h)       (h,)    (b, s, h)
    ``"sequence"``   ``False``         (b, s/t, h)     (h,)    (b, s/t, h)                        partial: weight
    ``"replicate"``  ``True``          (b, s, n/t, d)  (d,)    (b, s, n/t, d)                     partial: weight
    ===============  ================  ==============  ======  ==============  =======  ========  ===============

    Example::

        plan = {"norm": Replicated("sequence"), "attention.q_norm": Replicated(partial_gradient=True)}
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
