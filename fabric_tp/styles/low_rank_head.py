from __future__ import annotations

from fabric_tp.styles.lm_head import LMHead
from fabric_tp.styles.low_rank_colwise import LowRankColwise


class LowRankHead(LMHead):
    """Around a :class:`Colwise` layer to the vocabulary; its output as in :class:`LMHead`."""

    placements = LowRankColwise.placements
    partial = LowRankColwise.partial
