from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.layout import enter_sharded, entering, join, leave_sharded, leaving
from fabric_tp.styles.style import LocalModule, Parallelized, Style


class _ParallelResidualBlock(LocalModule):
    parallelized: Parallelized[ParallelResidual]

    def compute(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        this = self.parallelized
        normed = enter_sharded(this, self.get_submodule(this.style.norm)(x), this.style.layout, this.style.regather)
        attended = self.get_submodule(this.style.attention)(normed, *args, **kwargs)
        return (
            leave_sharded(this, attended + self.get_submodule(this.style.feed_forward)(normed), this.style.layout) + x
        )


class ParallelResidual(Style):
    """A block that computes ``x + attention(norm(x)) + feed_forward(norm(x))``, with one norm (Falcon, Phi).

    Attention and MLP share one gather and one reduction: half the communication of two.

    Args:
        norm: Name of the shared norm in the block.
        attention: Name of the attention, which gets the other arguments of the block; its output is a partial sum.
        feed_forward: Name of the MLP; its output is a partial sum.
        layout: How input and output of the block lie.
        regather: As in :class:`Colwise`.

    ===============  ===========  =========  ===========  ==============  =======================
    layout           x            inside     y            forward         backward
    ===============  ===========  =========  ===========  ==============  =======================
    ``"replicate"``  (b, s, h)    (b, s, h)  (b, s, h)    all-reduce      all-reduce
    ``"sequence"``   (b, s/t, h)  (b, s, h)  (b, s/t, h)  all-gather,     all-gather, all-gather,
                                                          reduce-scatter  reduce-scatter
    ===============  ===========  =========  ===========  ==============  =======================

    Raises:
        AttributeError: The block has no module of such a name.

    Example::

        plan = {"layers.*": ParallelResidual("norm", "attention", "mlp"), "layers.*.mlp.down": Rowwise(None)}
    """

    module_class = _ParallelResidualBlock

    def __init__(
        self, norm: str, attention: str, feed_forward: str, layout: Layout = "replicate", *, regather: bool = True
    ) -> None:
        self.norm, self.attention, self.feed_forward = norm, attention, feed_forward
        self.layout, self.regather = layout, regather

    def validate(self, module: nn.Module) -> None:
        for name in (self.norm, self.attention, self.feed_forward):
            module.get_submodule(name)

    def collectives(self) -> tuple[str, str]:
        return join(entering(self.layout, self.regather), leaving(self.layout))
