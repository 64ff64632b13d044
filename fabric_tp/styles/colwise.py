from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.styles.collectives import gather
from fabric_tp.styles.linear import enter
from fabric_tp.styles.style import Layout, Parallelized, Style, own_parameters


class Colwise(Style):
    """A linear layer split by output features.

    Args:
        input_layout: ``None``: the input is whole already and a module around this one sums its gradient
            (:class:`PrepareInput`). ``"replicate"`` or ``"sequence"``: this layer does that itself.
        regather: Of ``"sequence"``: keep the shard for the backward and gather it again there, beside the gradient of
            the input. Otherwise the gathered input is kept.

    =================  ===============  ==========  =============  ============================
    x                  weight           y           forward        backward
    =================  ===============  ==========  =============  ============================
    (b, s, h)          (f/t, h)         (b, s, f/t)                all-reduce
    (b, s/t, h)        (f/t, h)         (b, s, f/t) all-gather     (all-gather,) reduce-scatter
    =================  ===============  ==========  =============  ============================
    """

    def __init__(self, *, input_layout: Layout | None = "replicate", regather: bool = True) -> None:
        self.input_layout = input_layout
        self.regather = regather

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Shard(0) for name in own_parameters(module) if name in ("weight", "bias")}

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return enter_sharded(this, x, self.input_layout, self.regather)

    def collectives(self) -> tuple[str, str]:
        return entering(self.input_layout, self.regather)


def enter_sharded(this: Parallelized, x: Tensor, layout: Layout | None, regather: bool = False) -> Tensor:
    """The whole input of a sharded computation, of which each rank adds a part to the gradient."""
    if layout is None or this.group.size == 1:
        return x
    if layout == "sequence" and not regather:
        return gather(x, this.group)
    return enter(x, this.group, sequence=layout == "sequence")


def entering(layout: Layout | None, regather: bool) -> tuple[str, str]:
    if layout == "sequence":
        return "all-gather", "reduce-scatter + all-gather again" if regather else "reduce-scatter"
    return "", "all-reduce" if layout == "replicate" else ""
