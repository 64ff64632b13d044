from __future__ import annotations

from typing import Any

from torch import Tensor

from fabric_tp.styles.collectives import SEQUENCE_DIM, gather_replicated, scatter
from fabric_tp.styles.colwise import enter_sharded, entering
from fabric_tp.styles.rowwise import leave_sharded, leaving
from fabric_tp.styles.style import Layout, Parallelized, Style


class PrepareInput(Style):
    """A module whose column-wise layers share one input: it is gathered once, and its gradient is summed once.

    Args:
        input_layout: ``"replicate"`` or ``"sequence"``, how the first argument of the module's forward lies.
        regather: As in :class:`Colwise`.

    ==============  ===========  ============  ==============  ============================
    input_layout    x            inside        forward         backward
    ==============  ===========  ============  ==============  ============================
    ``"replicate"`` (b, s, h)    (b, s, h)                     all-reduce
    ``"sequence"``  (b, s/t, h)  (b, s, h)     all-gather      (all-gather,) reduce-scatter
    ==============  ===========  ============  ==============  ============================
    """

    def __init__(self, input_layout: Layout | None = "replicate", *, regather: bool = True) -> None:
        self.input_layout = input_layout
        self.regather = regather

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return enter_sharded(this, x, self.input_layout, self.regather)

    def collectives(self) -> tuple[str, str]:
        return entering(self.input_layout, self.regather)


class PrepareInputOutput(PrepareInput):
    """A module that makes partial sums of its output in several places: the input as above, the output summed once.

    Args:
        input_layout: As in :class:`PrepareInput`.
        output_layout: As in :class:`Rowwise`.
        regather: As in :class:`Colwise`.
    """

    def __init__(
        self,
        input_layout: Layout | None = "replicate",
        output_layout: Layout | None = "replicate",
        *,
        regather: bool = True,
    ) -> None:
        super().__init__(input_layout, regather=regather)
        self.output_layout = output_layout

    def leave(self, this: Parallelized, y: Any) -> Any:
        return leave_sharded(this, y, self.output_layout)

    def collectives(self) -> tuple[str, str]:
        return join(super().collectives(), leaving(self.output_layout))


class Unsharded(Style):
    """A module that every rank computes whole, among others that are sharded.

    Args:
        layout: How its input and output lie; it computes on the whole sequence in any case.

    ===============  ===========  ============  ==============  ==============
    layout           x, y         inside        forward         backward
    ===============  ===========  ============  ==============  ==============
    ``"replicate"``  (b, s, h)    (b, s, h)
    ``"sequence"``   (b, s/t, h)  (b, s, h)     all-gather      all-gather
    ===============  ===========  ============  ==============  ==============
    """

    def __init__(self, layout: Layout = "replicate") -> None:
        self.layout = layout

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return gather_replicated(x, this.group, SEQUENCE_DIM) if self.layout == "sequence" else x

    def leave(self, this: Parallelized, y: Any) -> Any:
        if self.layout != "sequence":
            return y
        if isinstance(y, tuple):  # attention that returns its weights too
            return (scatter(y[0], this.group), *y[1:])
        return scatter(y, this.group)

    def collectives(self) -> tuple[str, str]:
        return ("all-gather", "all-gather") if self.layout == "sequence" else ("", "")


class ScatterInput(Style):
    """The first block of a model whose embedding leaves the whole sequence: each rank takes its part of it.

    ===========  ============  ==============  ==============
    x            inside        forward         backward
    ===========  ============  ==============  ==============
    (b, s, h)    (b, s/t, h)                   all-gather
    ===========  ============  ==============  ==============
    """

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return scatter(x, this.group)

    def collectives(self) -> tuple[str, str]:
        return "", "all-gather"


def join(first: tuple[str, str], second: tuple[str, str]) -> tuple[str, str]:
    forward, backward = (" + ".join(filter(None, pair)) for pair in zip(first, second, strict=True))
    return forward, backward
