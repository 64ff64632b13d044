from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.styles.style import Style


class HeadBias(Style):
    """A module that has a bias for the vocabulary, its ``bias``: the head's own, tied to it, or one added by itself.

    ============  ======  ============  =======  ========
    x             bias    y             forward  backward
    ============  ======  ============  =======  ========
    (b, s, v/t)   (v/t,)  (b, s, v/t)
    ============  ======  ============  =======  ========

    Raises:
        ValueError: The vocabulary is so small that it leaves nothing for the last rank.

    Example::

        plan = {"predictions": HeadBias(), "predictions.decoder": LMHead()}
    """

    rounds_up = True

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {"bias": Shard(0)}
