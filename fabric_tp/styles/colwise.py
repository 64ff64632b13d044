from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.layout import enter_sharded, entering
from fabric_tp.styles.style import Parallelized, Style, own_parameters


class Colwise(Style):
    """A linear layer split by output features.

    Args:
        input_layout: ``None``: the input is whole already and a module around this one sums its gradient
            (:class:`PrepareInput`). ``"replicate"`` or ``"sequence"``: this layer does that itself.
        regather: Of ``"sequence"``: keep the shard for the backward and gather it again there, beside the gradient of
            the input. Otherwise the gathered input is kept.

    =================  ===============  ===========  =============  ============================
    x                  weight           y            forward        backward
    =================  ===============  ===========  =============  ============================
    (b, s, h)          (f/t, h)         (b, s, f/t)                 all-reduce
    (b, s/t, h)        (f/t, h)         (b, s, f/t)  all-gather     (all-gather,) reduce-scatter
    =================  ===============  ===========  =============  ============================
    """

    def __init__(self, input_layout: Layout | None = "replicate", *, regather: bool = True) -> None:
        self.input_layout = input_layout
        self.regather = regather

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Shard(0) for name in own_parameters(module) if name in ("weight", "bias")}

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return enter_sharded(this, x, self.input_layout, self.regather)

    def collectives(self) -> tuple[str, str]:
        return entering(self.input_layout, self.regather)
