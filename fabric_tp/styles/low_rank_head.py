from __future__ import annotations

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.lm_head import LMHead
from fabric_tp.styles.low_rank_colwise import LowRankColwise


class LowRankHead(LMHead):
    """A low-rank adapter around a :class:`Colwise` layer to the vocabulary; its output as in :class:`LMHead`.

    Args:
        input_layout: As in :class:`LowRankColwise`.
        loss_parallel: As in :class:`LMHead`.
        regather: As in :class:`Colwise`. It has an effect with adapters whose first layer is
            ``fabric_tp.autograd.linear.linear``; any other keeps the gathered input.

    =============== ============= =========== ====== ======== =========== =========== ============== ===============
    input_layout    loss_parallel x           lora_A lora_B   y           forward     backward       gradient
    =============== ============= =========== ====== ======== =========== =========== ============== ===============
    ``"replicate"`` ``True``      (b, s, h)   (r, h) (v/t, r) (b, s, v/t)             all-reduce     partial: lora_A
    ``"replicate"`` ``False``     (b, s, h)   (r, h) (v/t, r) (b, s, v)   all-gather  all-reduce     partial: lora_A
    ``"sequence"``  ``True``      (b, s/t, h) (r, h) (v/t, r) (b, s, v/t) all-gather  reduce-scatter partial: lora_A
    ``"sequence"``  ``False``     (b, s/t, h) (r, h) (v/t, r) (b, s, v)   all-gather, reduce-scatter partial: lora_A
                                                                          all-gather
    =============== ============= =========== ====== ======== =========== =========== ============== ===============

    Raises:
        ValueError: The number of ranks does not divide the vocabulary.

    Example::

        plan = {"lm_head": LowRankHead(), "lm_head.linear": Colwise(None)}
    """

    def __init__(
        self, input_layout: Layout | None = "replicate", *, loss_parallel: bool = True, regather: bool = False
    ) -> None:
        super().__init__(input_layout, loss_parallel=loss_parallel, regather=regather)

    placements = LowRankColwise.placements
    partial = LowRankColwise.partial
