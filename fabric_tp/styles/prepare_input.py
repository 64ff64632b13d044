from __future__ import annotations

from torch import Tensor

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.layout import enter_sharded, entering
from fabric_tp.styles.style import Parallelized, Style


class PrepareInput(Style):
    """A module whose column-wise layers share one input: it is gathered once, and its gradient is summed once.

    Args:
        input_layout: How the first argument of the module's forward lies. ``"replicate"``: whole on every rank.
            ``"sequence"``: each rank has its part. ``None``: whole, and a module around this one sums its gradient.
        regather: As in :class:`Colwise`.

    ===============  =========  ===========  =========  ==========  ==========================  ==========
    input_layout     regather   x            inside     forward     backward                    gradient
    ===============  =========  ===========  =========  ==========  ==========================  ==========
    ``"replicate"``  ``True``   (b, s, h)    (b, s, h)              all-reduce
    ``"sequence"``   ``True``   (b, s/t, h)  (b, s, h)  all-gather  all-gather, reduce-scatter
    ``"sequence"``   ``False``  (b, s/t, h)  (b, s, h)  all-gather  reduce-scatter
    ``None``         ``True``   (b, s, h)    (b, s, h)                                          partial: x
    ===============  =========  ===========  =========  ==========  ==========================  ==========

    Example::

        plan = {"mlp": PrepareInput("sequence"), "mlp.up": Colwise(None), "mlp.gate": Colwise(None)}
    """

    def __init__(self, input_layout: Layout | None = "replicate", *, regather: bool = True) -> None:
        self.input_layout = input_layout
        self.regather = regather

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return enter_sharded(this, x, self.input_layout, self.regather)

    def collectives(self) -> tuple[str, str]:
        return entering(self.input_layout, self.regather)
