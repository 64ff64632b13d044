"""Where activations pass from one layout to another: into a sharded computation and out of it.

=================  ===============  ==============  ==============
function           layout           forward         backward
=================  ===============  ==============  ==============
``enter_sharded``  ``"replicate"``                  all-reduce
``enter_sharded``  ``"sequence"``   all-gather      reduce-scatter
``enter_sharded``  ``None``
``leave_sharded``  ``"replicate"``  all-reduce
``leave_sharded``  ``"sequence"``   reduce-scatter  all-gather
``leave_sharded``  ``None``
=================  ===============  ==============  ==============

With ``regather`` the backward also gathers the input again, if linear layers took it.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fabric_tp.autograd.collectives import Layout, gather, reduce, reduce_scatter
from fabric_tp.autograd.kept_reductions import reduction
from fabric_tp.autograd.linear import enter
from fabric_tp.styles.style import Parallelized


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


def leave_sharded(this: Parallelized, y: Tensor, layout: Layout | None) -> Tensor:
    """The output of a sharded computation, of which each rank has a partial sum."""
    return y if layout is None else reduction(partial(summed, this, y, layout))


def summed(this: Parallelized, y: Tensor, layout: Layout | None) -> Tensor:
    if layout == "sequence":
        return reduce_scatter(y, this.group)
    return reduce(y, this.group) if layout == "replicate" else y


def leaving(layout: Layout | None) -> tuple[str, str]:
    return {None: ("", ""), "replicate": ("all-reduce", ""), "sequence": ("reduce-scatter", "all-gather")}[layout]


def join(first: tuple[str, str], second: tuple[str, str]) -> tuple[str, str]:
    forward, backward = (" + ".join(filter(None, pair)) for pair in zip(first, second, strict=True))
    return forward, backward


def check_sequence_length(length: int, size: int) -> None:
    if length % size:
        raise ValueError(
            f"With sequence_parallel=True the sequence length must be a multiple of tensor_parallel_size={size}, but is"
            f" {length}. Pad the batch to {length + -length % size}, or use sequence_parallel=False."
        )
