from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from fabric_tp.autograd.collectives import Layout, gather_replicated
from fabric_tp.loss.deferred import DeferredLogits, LMHeadCall, autocast
from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.layout import enter_sharded, padding_of
from fabric_tp.styles.style import LocalModule, Parallelized


class _LMHead(LocalModule):
    parallelized: Parallelized[LMHead]
    vocabulary: int
    """v, which the ranks need not divide; 0 where it is not this module's own weight that makes them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, this = super().forward(*args, **kwargs), self.parallelized
        vocabulary = self.vocabulary or y.shape[-1] * this.group.size
        return y if this.style.fused_loss else this.style.sharded(this, y, vocabulary)

    def compute(self, x: Tensor) -> Tensor:
        this, style = self.parallelized, self.parallelized.style
        if not style.fused_loss:
            return super().compute(x)

        def logits(call: LMHeadCall, rows: Tensor | None) -> Tensor:
            x = enter_sharded(this, call.hidden, call.layout, padding=call.padding)
            if rows is not None:
                x = x.flatten(0, -2)[rows]
            return style.sharded(this, F.linear(x, call.weight, call.bias), call.vocabulary)

        hidden, weight, bias = (autocast(tensor) for tensor in (x, self.weight, self.bias))
        layout = style.input_layout
        assert layout
        call = LMHeadCall(
            hidden=hidden,
            weight=weight,
            bias=bias,
            vocabulary=self.vocabulary,
            group=this.group,
            layout=layout,
            padding=padding_of(this),
            compute=logits,
        )
        return DeferredLogits.of(call)


class LMHead(Colwise):
    """The last linear layer, split by rows of the vocabulary.

    With ``fused_loss`` the collectives are the same, but those of forward and backward are part of the loss.

    Args:
        input_layout: As in :class:`Colwise`.
        loss_parallel: ``True``: the logits stay sharded, as a DTensor ``Shard(-1)`` of shape (b, s, v), for
            :func:`fabric_tp.cross_entropy` or torch's ``loss_parallel()``. ``False``: every rank gets all of them.
        fused_loss: The logits are left to :func:`fabric_tp.cross_entropy`, which computes them a chunk at a time
            (:func:`fabric_tp.linear_cross_entropy`); whatever else looks at them gets them as ``loss_parallel`` says.
        regather: As in :class:`Colwise`.

    ===============  =============  ===========  ========  ===========  ===========  ==============
    input_layout     loss_parallel  x            weight    y            forward      backward
    ===============  =============  ===========  ========  ===========  ===========  ==============
    ``"replicate"``  ``True``       (b, s, h)    (v/t, h)  (b, s, v/t)               all-reduce
    ``"replicate"``  ``False``      (b, s, h)    (v/t, h)  (b, s, v)    all-gather   all-reduce
    ``"sequence"``   ``True``       (b, s/t, h)  (v/t, h)  (b, s, v/t)  all-gather   all-gather,
                                                                                     reduce-scatter
    ``"sequence"``   ``False``      (b, s/t, h)  (v/t, h)  (b, s, v)    all-gather,  all-gather,
                                                                        all-gather   reduce-scatter
    ===============  =============  ===========  ========  ===========  ===========  ==============

    Raises:
        ValueError: ``fused_loss`` for a head that is no ``nn.Linear``, or whose ``input_layout`` is None; the
            vocabulary is so small that it leaves nothing for the last rank.

    Example::

        plan = {"norm": Replicated("sequence"), "lm_head": LMHead("sequence")}
    """

    module_class = _LMHead
    rounds_up = True

    def __init__(
        self,
        input_layout: Layout | None = "replicate",
        *,
        loss_parallel: bool = True,
        fused_loss: bool = False,
        regather: bool = True,
    ) -> None:
        super().__init__(input_layout, regather=regather)
        self.loss_parallel = loss_parallel
        self.fused_loss = fused_loss

    def fits(self, module: nn.Module) -> bool:
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        return not self.fused_loss or (plain and self.input_layout is not None)

    def validate(self, module: nn.Module) -> None:
        if not self.fits(module):
            raise ValueError(
                "fused_loss=True needs a head that is a torch.nn.Linear, with the forward of that class, and takes its"
                f" input as it comes, and this is a {type(module).__name__} with input_layout={self.input_layout!r}."
                " Use fused_loss=False."
            )

    def prepare(self, module: nn.Module, this: Parallelized) -> None:
        module.vocabulary = next(iter(self.split_sizes(module).values()), 0)  # type: ignore[assignment]

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return x if self.fused_loss else super().enter(this, x)

    def sharded(self, this: Parallelized, y: Tensor, vocabulary: int) -> Tensor:
        """This rank's logits, as the model returns them."""
        if not self.loss_parallel:
            padding = -vocabulary % this.group.size
            share = (vocabulary + padding) // this.group.size
            return gather_replicated(F.pad(y, (0, share - y.shape[-1])), this.group, padding=padding)
        shape = torch.Size((*y.shape[:-1], vocabulary))
        stride = tuple(shape[dim + 1 :].numel() for dim in range(len(shape)))
        return DTensor.from_local(y, this.mesh, [Shard(y.dim() - 1)], run_check=False, shape=shape, stride=stride)

    def collectives(self) -> tuple[str, str]:
        forward, backward = super().collectives()
        return (forward if self.loss_parallel else f"{forward} + all-gather".removeprefix(" + ")), backward
