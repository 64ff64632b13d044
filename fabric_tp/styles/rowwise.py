from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Layout
from fabric_tp.autograd.halves import give_way_between
from fabric_tp.autograd.kept_reductions import reduction
from fabric_tp.autograd.linear import linear
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.layout import leaving, summed
from fabric_tp.styles.parameters import check_linear, output_dim, own_parameters
from fabric_tp.styles.style import LocalModule, Parallelized, Style


class _RowwiseLinear(LocalModule):
    parallelized: Parallelized[Rowwise]

    def compute(self, x: Tensor) -> Tensor:
        """Without the bias, which is added once: after the reduction, or, if that happens elsewhere, by one rank."""
        this, style, group = self.parallelized, self.parallelized.style, self.parallelized.group
        weight = this.outputs_first(self.weight)  # type: ignore[arg-type]
        bias = self._parameters.get("bias") if style.output_layout is None else None
        give_way_between()
        # Times zero on the other ranks, so that they have a gradient too: all must take part in the sum.
        return linear(x, [weight], [None if bias is None else bias * (group.rank == 0)])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bias, style = self._parameters.get("bias"), self.parallelized.style
        if style.output_layout is None:
            return super().forward(*args, **kwargs)
        y = reduction(super().forward, *args, *kwargs.values())
        if bias is None:
            return y
        return y + self.local("bias", bias)


class Rowwise(Style):
    """A linear layer split by input features; its input is what a column-wise layer left on this rank.

    The bias is added once, after the reduction. Where each rank adds it to its part of the sequence, or one rank to its
    partial sum, its gradient is a partial sum.

    Args:
        output_layout: ``"replicate"``: the whole output on every rank. ``"sequence"``: each rank its part of the
            sequence. ``None``: the output stays a partial sum, for a module around this one to sum.
        takes_rows: As in :class:`Colwise`: (b * s, f/t) for x, (b * s/t, h) for y.
        heads: As in :class:`Colwise`, of the input features.

    ===============  ===========  ========  =================  ==============  ==========  =============
    output_layout    x            weight    y                  forward         backward    gradient
    ===============  ===========  ========  =================  ==============  ==========  =============
    ``"replicate"``  (b, s, f/t)  (h, f/t)  (b, s, h)          all-reduce
    ``"sequence"``   (b, s, f/t)  (h, f/t)  (b, s/t, h)        reduce-scatter  all-gather  partial: bias
    ``None``         (b, s, f/t)  (h, f/t)  (b, s, h) partial                              partial: bias
    ===============  ===========  ========  =================  ==============  ==========  =============

    Raises:
        ValueError: The module is no linear layer; the number of ranks does not divide the input features.

    Example::

        plan = {"mlp.up": Colwise("sequence"), "mlp.down": Rowwise("sequence")}
    """

    module_class = _RowwiseLinear

    def __init__(
        self,
        output_layout: Layout | None = "replicate",
        *,
        takes_rows: bool = False,
        heads: Heads | None = None,
    ) -> None:
        self.output_layout = output_layout
        self.takes_rows = takes_rows
        self.heads = self.uncut = heads

    def validate(self, module: nn.Module) -> None:
        check_linear("Rowwise", module)

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        places: dict[str, Placement] = {"weight": Shard(1 - output_dim(module)), "bias": Replicate()}
        return {name: places[name] for name in own_parameters(module) if name in places}

    def partial(self, module: nn.Module) -> frozenset[str]:
        has_bias = "bias" in own_parameters(module)
        return frozenset({"bias"} if has_bias and self.output_layout != "replicate" else ())

    def leave(self, this: Parallelized, y: Tensor) -> Tensor:
        return summed(this, y, self.output_layout, self.takes_rows)

    def collectives(self) -> tuple[str, str]:
        return leaving(self.output_layout)
