from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import SEQUENCE_DIM, Layout, gather_replicated, scatter
from fabric_tp.styles.layout import padding_of
from fabric_tp.styles.parameters import own_parameters
from fabric_tp.styles.style import LocalModule, Parallelized, Style


class Unsharded(Style):
    """A module that every rank computes whole, among others that are sharded.

    Its own parameters are whole too. Modules in it that have parameters need styles of their own.

    Args:
        layout: How its input and output lie; it computes on the whole sequence in any case.
        reads: Modules inside, with a style of their own, whose parameters the forward of this one may read itself.

    ===============  ===========  =========  ===========  ==========  ==========
    layout           x            inside     y            forward     backward
    ===============  ===========  =========  ===========  ==========  ==========
    ``"replicate"``  (b, s, h)    (b, s, h)  (b, s, h)
    ``"sequence"``   (b, s/t, h)  (b, s, h)  (b, s/t, h)  all-gather  all-gather
    ===============  ===========  =========  ===========  ==========  ==========

    Example::

        plan = {"attention": Unsharded("sequence"), "attention.wq": Replicated(), "attention.wo": Replicated()}
    """

    module_class = LocalModule

    def __init__(self, layout: Layout = "replicate", *, reads: tuple[str, ...] = ()) -> None:
        self.layout, self.reads = layout, reads

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Replicate() for name in own_parameters(module)}

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return gather_replicated(x, this.group, SEQUENCE_DIM, padding_of(this)) if self.layout == "sequence" else x

    def leave(self, this: Parallelized, y: Any) -> Any:
        if self.layout != "sequence":
            return y
        if isinstance(y, tuple):  # attention that returns its weights too
            return (scatter(y[0], this.group), *y[1:])
        return scatter(y, this.group)

    def collectives(self) -> tuple[str, str]:
        return ("all-gather", "all-gather") if self.layout == "sequence" else ("", "")
