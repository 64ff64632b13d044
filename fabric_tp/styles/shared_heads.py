from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.parameters import own_parameters
from fabric_tp.styles.style import LocalModule, Parallelized


class _SharedHeadsLinear(LocalModule):
    parallelized: Parallelized[SharedHeads]

    def localize(self, name: str, local: Tensor) -> Tensor:
        this = self.parallelized
        return this.style.heads.select(local, this.group, this.output_dim(local))


class SharedHeads(Colwise):
    """The key or value projection where there are more ranks than heads of it: whole on each rank, which uses its part.

    Its gradient is partial: other ranks use other rows, or the same ones for other queries.

    Args:
        heads: Of the attention module.
        input_layout: As in :class:`Colwise`.
        regather: As in :class:`Colwise`.

    With k for the key and value heads that a rank computes, which are among those that the f features are:

    ===============  ===========  ======  =============  ==========  ==========================  ==================
    input_layout     x            weight  y              forward     backward                    gradient
    ===============  ===========  ======  =============  ==========  ==========================  ==================
    ``"replicate"``  (b, s, h)    (f, h)  (b, s, k * d)              all-reduce                  partial: weight
    ``"sequence"``   (b, s/t, h)  (f, h)  (b, s, k * d)  all-gather  all-gather, reduce-scatter  partial: weight
    ``None``         (b, s, h)    (f, h)  (b, s, k * d)                                          partial: x, weight
    ===============  ===========  ======  =============  ==========  ==========================  ==================

    Example::

        plan = {"attention.wk": SharedHeads(Heads(8, 2), None), "attention.wv": SharedHeads(Heads(8, 2), None)}
    """

    module_class = _SharedHeadsLinear
    heads: Heads

    def __init__(self, heads: Heads, input_layout: Layout | None = "replicate", *, regather: bool = True) -> None:
        super().__init__(input_layout, regather=regather)
        self.heads = heads

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Replicate() for name in super().placements(module)}

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset(own_parameters(module))
