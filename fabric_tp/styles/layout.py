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

import torch
from torch import Tensor

from fabric_tp.autograd.collectives import SEQUENCE_DIM, Layout, gather, reduce, reduce_scatter
from fabric_tp.autograd.kept_reductions import reduction
from fabric_tp.autograd.shared_input import enter, gather_early
from fabric_tp.styles.style import Parallelized


def enter_sharded(
    this: Parallelized,
    x: Tensor,
    layout: Layout | None,
    regather: bool = False,
    padding: int | None = None,
    takes_rows: bool = False,
) -> Tensor:
    """The whole input of a sharded computation, of which each rank adds a part to the gradient.

    Args:
        padding: Rows that fill up the sequence; by default those of the forward that is running.
        takes_rows: As in :func:`sequence_dim`.
    """
    if layout is None or this.group.size == 1:
        return x
    if layout == "replicate":
        return enter(x, this.group, sequence=False)
    dim = sequence_dim(x, takes_rows)
    if padding is None:
        padding = padding_of(this) if dim == SEQUENCE_DIM else 0
    if regather:
        return enter(x, this.group, sequence=True, padding=padding, dim=dim)
    return gather(x, this.group, dim, padding)


def padding_of(this: Parallelized) -> int:
    """Rows that fill up the sequence of the forward that is running."""
    return this.padding.rows if this.padding else 0


def divide_sequence(this: Parallelized, length: int) -> None:
    """A forward begins to divide a sequence of this length among the ranks.

    Raises:
        ValueError: They do not divide it, and the modules that gather it cannot know how it was filled up.
    """
    if this.padding:
        this.padding.note(length, this.group.size)
    elif length % this.group.size:
        raise ValueError(
            f"The sequence length is {length}, and no multiple of tensor_parallel_size={this.group.size}. A model that"
            " fabric_tp.from_plan(plan) parallelizes takes sequences of any length; with torch's parallelize_module pad"
            f" the batch to {length + -length % this.group.size}, or use the layout 'replicate'."
        )


def entering(layout: Layout | None, regather: bool) -> tuple[str, str]:
    if layout == "sequence":
        return "all-gather", "reduce-scatter + all-gather again" if regather else "reduce-scatter"
    return "", "all-reduce" if layout == "replicate" else ""


def leave_sharded(this: Parallelized, y: Tensor, layout: Layout | None) -> Tensor:
    """The output of a sharded computation, of which each rank has a partial sum."""
    return y if layout is None else reduction(partial(summed, this, y, layout))


def summed(this: Parallelized, y: Tensor, layout: Layout | None, takes_rows: bool = False) -> Tensor:
    if layout == "sequence":
        then = None if torch.compiler.is_compiling() else gather_early()
        return reduce_scatter(y, this.group, sequence_dim(y, takes_rows), then)
    return reduce(y, this.group) if layout == "replicate" else y


def sequence_dim(x: Tensor, takes_rows: bool) -> int:
    """The dimension of tokens in ``(b, s, h)``; or, if they may also come in a row, in ``(b * s, h)``.

    In a row the ranks' tokens are put together rank by rank, and not sample by sample, with all that fills them up: for
    layers that treat each token by itself, and give each rank its own back.
    """
    return 0 if takes_rows and x.dim() == 2 else SEQUENCE_DIM


def leaving(layout: Layout | None) -> tuple[str, str]:
    return {None: ("", ""), "replicate": ("all-reduce", ""), "sequence": ("reduce-scatter", "all-gather")}[layout]


def join(first: tuple[str, str], second: tuple[str, str]) -> tuple[str, str]:
    forward, backward = (" + ".join(filter(None, pair)) for pair in zip(first, second, strict=True))
    return forward, backward
