from __future__ import annotations

from fabric_tp.styles.random_module import RandomModule
from fabric_tp.styles.replicated import Replicated


class RandomReplicated(Replicated):
    """A module that every rank holds whole and that may draw random numbers in training: a router that samples experts.

    It draws from a state of its own, made of the seed and the call: the same numbers on all ranks, which see the same
    tokens, other ones in other calls, and the same when activations are computed again.

    What is in it and has parameters needs styles of its own.

    Args:
        partial_gradient: As in :class:`Replicated`.
        reads: As in :class:`PrepareInputOutput`.

    ================  ==============  ======  ==============  =======  ========  ===============
    partial_gradient  x               weight  y               forward  backward  gradient
    ================  ==============  ======  ==============  =======  ========  ===============
    ``False``         (b, s, h)       (h,)    (b, s, h)
    ``True``          (b, s, n/t, d)  (d,)    (b, s, n/t, d)                     partial: weight
    ================  ==============  ======  ==============  =======  ========  ===============

    Raises:
        ValueError: When it is called in training: nobody told it the seed.

    Example::

        plan = {"moe": PrepareInputOutput(), "moe.router": RandomReplicated(partial_gradient=True)}
    """

    module_class = RandomModule

    def __init__(self, *, partial_gradient: bool = False, reads: tuple[str, ...] = ()) -> None:
        super().__init__("replicate", partial_gradient=partial_gradient)
        self.reads = reads
