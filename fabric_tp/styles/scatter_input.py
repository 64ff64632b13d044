from __future__ import annotations

from torch import Tensor

from fabric_tp.autograd.collectives import SEQUENCE_DIM, scatter
from fabric_tp.styles.layout import divide_sequence
from fabric_tp.styles.style import Parallelized, Style


class ScatterInput(Style):
    """The first block of a model whose embedding leaves the whole sequence: each rank takes its part of it.

    =========  ===========  =======  ==========
    x          inside       forward  backward
    =========  ===========  =======  ==========
    (b, s, h)  (b, s/t, h)           all-gather
    =========  ===========  =======  ==========

    Example::

        plan = {"embed_tokens": VocabParallelEmbedding(), "layers.0": ScatterInput()}
    """

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        divide_sequence(this, x.shape[SEQUENCE_DIM])
        return scatter(x, this.group)

    def collectives(self) -> tuple[str, str]:
        return "", "all-gather"
