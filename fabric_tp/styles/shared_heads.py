from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.attention_heads import Heads
from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.style import LocalModule, Parallelized, own_parameters


class _SharedHeadsLinear(LocalModule):
    parallelized: Parallelized[SharedHeads]

    def localize(self, name: str, local: Tensor) -> Tensor:
        return self.parallelized.style.heads.select(local, self.parallelized.group)


class SharedHeads(Colwise):
    """The key or value projection where there are more ranks than heads of it: whole on each rank, which uses its part.

    Args:
        heads: Of the attention module.
        input_layout: As in :class:`Colwise`.
        regather: As in :class:`Colwise`.

    ===============  ====================  ==============  ====================================
    x                weight                y               gradient
    ===============  ====================  ==============  ====================================
    (b, s, h)        (kv heads * d, h),    (b, s, kv * d)  partial: other ranks use other rows,
                     kv of them used                       or the same ones for other queries
    ===============  ====================  ==============  ====================================
    """

    module_class = _SharedHeadsLinear

    def __init__(self, heads: Heads, input_layout: Layout | None = "replicate", *, regather: bool = True) -> None:
        super().__init__(input_layout, regather=regather)
        self.heads = heads

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Replicate() for name in super().placements(module)}

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset(own_parameters(module))
