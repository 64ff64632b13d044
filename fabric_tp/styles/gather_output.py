from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.collectives import SEQUENCE_DIM, gather_replicated
from fabric_tp.styles.layout import padding_of
from fabric_tp.styles.parameters import own_parameters
from fabric_tp.styles.style import Parallelized, Style


class GatherOutput(Style):
    """The last norm of a model that reshapes or cuts its output by the sequence length: every rank gets all of it.

    It is computed on each rank's part of the sequence. What follows must be the same on every rank, up to a layer that
    sums its input's gradient, such as ``LMHead("replicate")``.

    ===========  ======  =========  ==========  ========  ===============
    x            weight  y          forward     backward  gradient
    ===========  ======  =========  ==========  ========  ===============
    (b, s/t, h)  (h,)    (b, s, h)  all-gather            partial: weight
    ===========  ======  =========  ==========  ========  ===============

    Example::

        plan = {"norm": GatherOutput(), "lm_head": LMHead("replicate")}
    """

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Replicate() for name in own_parameters(module)}

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset(own_parameters(module))

    def leave(self, this: Parallelized, y: Tensor) -> Tensor:
        return gather_replicated(y, this.group, SEQUENCE_DIM, padding_of(this))

    def collectives(self) -> tuple[str, str]:
        return "all-gather", "(in the bucket)"
