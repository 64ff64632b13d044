from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.layout import enter_sharded, entering
from fabric_tp.styles.parameters import output_dim, own_parameters
from fabric_tp.styles.stand_in import whole
from fabric_tp.styles.style import Parallelized, Style


class Colwise(Style):
    """A linear layer split by output features: each rank has some rows of the weight, and makes those features.

    The weight may be stored as (inputs, outputs) too, by a class that ``architectures/linear.py`` knows; the tables
    here show torch's.

    Args:
        input_layout: How the input lies. ``"replicate"``: whole on every rank. ``"sequence"``: each rank has its part.
            ``None``: it is whole, and a module around this one sums its gradient (:class:`PrepareInput`).
        regather: Of ``"sequence"``: keep the shard for the backward and gather it again there, beside the gradient of
            the input. Otherwise the gathered input is kept.
        takes_rows: The input may also be tokens in a row, (b * s/t, h) for x and (b * s, f/t) for y, of all ranks one
            after the other; then a :class:`Rowwise` that says the same must follow.
        heads: The output features are those of its query heads, of which the number of ranks need not divide how many
            there are. Each rank stores its even part of the weight, and computes ``ceil(n / t)`` whole heads: an
            all-to-all of rows in the forward, and one of their gradients in the backward.

    ===============  =========  ===========  ========  ===========  ==========  ==========================  ==========
    input_layout     regather   x            weight    y            forward     backward                    gradient
    ===============  =========  ===========  ========  ===========  ==========  ==========================  ==========
    ``"replicate"``  ``True``   (b, s, h)    (f/t, h)  (b, s, f/t)              all-reduce
    ``"sequence"``   ``True``   (b, s/t, h)  (f/t, h)  (b, s, f/t)  all-gather  all-gather, reduce-scatter
    ``"sequence"``   ``False``  (b, s/t, h)  (f/t, h)  (b, s, f/t)  all-gather  reduce-scatter
    ``None``         ``True``   (b, s, h)    (f/t, h)  (b, s, f/t)                                          partial: x
    ===============  =========  ===========  ========  ===========  ==========  ==========================  ==========

    Raises:
        ValueError: The number of ranks does not divide the output features, or these are not those of ``heads``.

    Example::

        plan = {"mlp.up": Colwise(), "mlp.down": Rowwise()}
    """

    def __init__(
        self,
        input_layout: Layout | None = "replicate",
        *,
        regather: bool = True,
        takes_rows: bool = False,
        heads: Heads | None = None,
    ) -> None:
        self.input_layout = input_layout
        self.regather = regather
        self.takes_rows = takes_rows
        self.heads = self.uncut = heads

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        places: dict[str, Placement] = {"weight": Shard(output_dim(module)), "bias": Shard(0)}
        return {name: places[name] for name in own_parameters(module) if name in places}

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return enter_sharded(this, whole(x), self.input_layout, self.regather, takes_rows=self.takes_rows)

    def collectives(self) -> tuple[str, str]:
        return entering(self.input_layout, self.regather)
