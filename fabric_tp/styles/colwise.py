from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.styles.collectives import copy, gather
from fabric_tp.styles.style import Layout, Parallelized, Style, own_parameters


class Colwise(Style):
    """A linear layer split by output features.

    Args:
        input_layout: ``None``: the input is whole already and a module around this one sums its gradient
            (:class:`PrepareInput`). ``"replicate"`` or ``"sequence"``: this layer does that itself.

    =================  ===============  ==========  =============  ==============
    x                  weight           y           forward        backward
    =================  ===============  ==========  =============  ==============
    (b, s, h)          (f/t, h)         (b, s, f/t)                all-reduce
    (b, s/t, h)        (f/t, h)         (b, s, f/t) all-gather     reduce-scatter
    =================  ===============  ==========  =============  ==============
    """

    def __init__(self, *, input_layout: Layout | None = "replicate") -> None:
        self.input_layout = input_layout

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Shard(0) for name in own_parameters(module) if name in ("weight", "bias")}

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return enter_sharded(this, x, self.input_layout)

    def collectives(self) -> tuple[str, str]:
        return entering(self.input_layout)


def enter_sharded(this: Parallelized, x: Tensor, layout: Layout | None) -> Tensor:
    """The whole input of a sharded computation, of which each rank adds a part to the gradient."""
    if layout == "sequence":
        return gather(x, this.group)
    return copy(x, this.group) if layout == "replicate" else x


def entering(layout: Layout | None) -> tuple[str, str]:
    return {None: ("", ""), "replicate": ("", "all-reduce"), "sequence": ("all-gather", "reduce-scatter")}[layout]
