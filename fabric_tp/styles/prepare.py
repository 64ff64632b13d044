from __future__ import annotations

import copy
import operator
from collections.abc import Mapping

from torch import Tensor, nn

from fabric_tp.styles.collectives import Group
from fabric_tp.styles.colwise import enter_sharded, entering
from fabric_tp.styles.style import Layout, Parallelized, Style


class PrepareInput(Style):
    """A module whose column-wise layers share one input: it is gathered once, and its gradient is summed once.

    Args:
        input_layout: ``"replicate"`` or ``"sequence"``, how the first argument of the module's forward lies.

    ==============  ===========  ============  ==============  ==============
    input_layout    x            inside        forward         backward
    ==============  ===========  ============  ==============  ==============
    ``"replicate"`` (b, s, h)    (b, s, h)                     all-reduce
    ``"sequence"``  (b, s/t, h)  (b, s, h)     all-gather      reduce-scatter
    ==============  ===========  ============  ==============  ==============
    """

    def __init__(self, input_layout: Layout = "replicate") -> None:
        self.input_layout: Layout = input_layout

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return enter_sharded(this, x, self.input_layout)

    def collectives(self) -> tuple[str, str]:
        return entering(self.input_layout)


class ShardHeads(PrepareInput):
    """An attention module that computes with this rank's heads only.

    Args:
        heads: The attributes that count heads, as paths from the module (``"n_heads"``, ``"config.n_head"``); each is
            divided by the number of ranks. An object on the way, such as a shared config, is copied, never changed.
        input_layout: As in :class:`PrepareInput`.
    """

    def __init__(self, heads: tuple[str, ...], *, input_layout: Layout = "replicate") -> None:
        super().__init__(input_layout)
        self.heads = heads

    def divided(self, module: nn.Module) -> Mapping[str, int]:
        return {path: operator.attrgetter(path)(module) for path in self.heads}

    def prepare(self, module: nn.Module, group: Group) -> None:
        local = {path: number // group.size for path, number in self.divided(module).items()}
        for owner in sorted({path.rpartition(".")[0] for path in local} - {""}):
            parent, _, name = owner.rpartition(".")
            holder = operator.attrgetter(parent)(module) if parent else module
            setattr(holder, name, copy.copy(getattr(holder, name)))
        for path, number in local.items():
            owner, _, name = path.rpartition(".")
            setattr(operator.attrgetter(owner)(module) if owner else module, name, number)
