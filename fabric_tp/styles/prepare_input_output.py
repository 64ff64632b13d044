from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.attention_heads import set_attributes
from fabric_tp.styles.layout import join, leave_sharded, leaving
from fabric_tp.styles.prepare_input import PrepareInput
from fabric_tp.styles.style import LocalModule, Parallelized


class _Summed(LocalModule):
    parallelized: Parallelized[PrepareInputOutput]

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        y = super().compute(*args, **kwargs)
        first = y[0] if isinstance(y, tuple) else y
        if args and first.dim() == 2 < args[0].dim():  # all tokens in a row, of which each rank is to get its part
            first = first.view(*args[0].shape[:-1], -1)
        return (first, *y[1:]) if isinstance(y, tuple) else first


class PrepareInputOutput(PrepareInput):
    """A module that makes partial sums of its output in several places: the input as above, the output summed once.

    Of a tuple only the first is such a sum; the rest, such as a router's scores, is the same on every rank. An output
    of all tokens in a row, (b * s, h), leaves as below.

    Args:
        input_layout: As in :class:`PrepareInput`.
        output_layout: As in :class:`Rowwise`.
        regather: As in :class:`Colwise`.
        reads: Modules inside, with a style of their own, whose parameters the forward of this one may read itself.
        whole: Parameters of the module itself, of which every rank needs all.
        hidden_sizes: Attributes, by path from the module, that count hidden features: each rank gets its share.

    ===============  ===============  ===========  =========  ===========  ==============  =======================
    input_layout     output_layout    x            inside     y            forward         backward
    ===============  ===============  ===========  =========  ===========  ==============  =======================
    ``"replicate"``  ``"replicate"``  (b, s, h)    (b, s, h)  (b, s, h)    all-reduce      all-reduce
    ``"sequence"``   ``"sequence"``   (b, s/t, h)  (b, s, h)  (b, s/t, h)  all-gather,     all-gather, all-gather,
                                                                           reduce-scatter  reduce-scatter
    ===============  ===============  ===========  =========  ===========  ==============  =======================

    Example::

        plan = {
            "moe": PrepareInputOutput(),
            "moe.experts.*.up": Colwise(None),
            "moe.experts.*.down": Rowwise(None),
        }
    """

    module_class = _Summed

    def __init__(
        self,
        input_layout: Layout | None = "replicate",
        output_layout: Layout | None = "replicate",
        *,
        regather: bool = True,
        reads: tuple[str, ...] = (),
        whole: tuple[str, ...] = (),
        hidden_sizes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(input_layout, regather=regather)
        self.output_layout, self.reads = output_layout, reads
        self.whole, self.hidden_sizes = whole, hidden_sizes

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Replicate() for name in self.whole}

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset(self.whole)

    def divided(self, module: nn.Module) -> Mapping[str, int]:
        return {path: operator.attrgetter(path)(module) for path in self.hidden_sizes}

    def prepare(self, module: nn.Module, this: Parallelized) -> None:
        sizes = self.divided(module)
        set_attributes(module, {path: size // this.group.size for path, size in sizes.items()})

    def leave(self, this: Parallelized, y: Any) -> Any:
        if isinstance(y, tuple):
            return (self.leave(this, y[0]), *y[1:])
        return leave_sharded(this, y, self.output_layout)

    def collectives(self) -> tuple[str, str]:
        return join(super().collectives(), leaving(self.output_layout))
