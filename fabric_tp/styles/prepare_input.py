from __future__ import annotations

from torch import Tensor

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.layout import enter_sharded, entering
from fabric_tp.styles.style import Parallelized, Style


class PrepareInput(Style):
    """A module whose column-wise layers share one input: it is gathered once, and its gradient is summed once.

    Args:
        input_layout: ``"replicate"`` or ``"sequence"``, how the first argument of the module's forward lies.
        regather: As in :class:`Colwise`.

    ===============  ===========  ============  ==============  ============================
    input_layout     x            inside        forward         backward
    ===============  ===========  ============  ==============  ============================
    ``"replicate"``  (b, s, h)    (b, s, h)                     all-reduce
    ``"sequence"``   (b, s/t, h)  (b, s, h)     all-gather      (all-gather,) reduce-scatter
    ===============  ===========  ============  ==============  ============================
    """

    def __init__(self, input_layout: Layout | None = "replicate", *, regather: bool = True) -> None:
        self.input_layout = input_layout
        self.regather = regather

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return enter_sharded(this, x, self.input_layout, self.regather)

    def collectives(self) -> tuple[str, str]:
        return entering(self.input_layout, self.regather)
