from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from fabric_tp.styles.collectives import gather_replicated
from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.style import Layout, Parallelized


class LMHead(Colwise):
    """The last linear layer, split by rows of the vocabulary.

    Args:
        loss_parallel: ``True``: the logits stay sharded, as a DTensor ``Shard(-1)``, for
            :func:`fabric_tp.cross_entropy` or torch's ``loss_parallel()``. ``False``: every rank gets all of them.
        input_layout: As in :class:`Colwise`.

    =============  ========================  ==========================  ==============
    loss_parallel  logits                    forward                     backward
    =============  ========================  ==========================  ==============
    ``True``       DTensor (b, s, v), v/t    (all-gather)                all-reduce or
                   on each rank                                          reduce-scatter
    ``False``      (b, s, v)                 (all-gather,) all-gather    the same
    =============  ========================  ==========================  ==============
    """

    def __init__(self, *, loss_parallel: bool = True, input_layout: Layout | None = "replicate") -> None:
        super().__init__(input_layout=input_layout)
        self.loss_parallel = loss_parallel

    def leave(self, this: Parallelized, y: Tensor) -> Tensor:
        if self.loss_parallel:
            return DTensor.from_local(y, this.mesh, [Shard(y.dim() - 1)], run_check=False)
        return gather_replicated(y, this.group)

    def collectives(self) -> tuple[str, str]:
        forward, backward = super().collectives()
        return (forward if self.loss_parallel else f"{forward} + all-gather".removeprefix(" + ")), backward
