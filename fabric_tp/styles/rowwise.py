from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.styles.collectives import reduce, reduce_scatter
from fabric_tp.styles.style import Layout, LocalModule, Parallelized, Style, own_parameters


class _RowwiseLinear(LocalModule):
    def compute(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)  # type: ignore[arg-type]  # the bias is added once, after the reduction

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(*args, **kwargs)
        bias = self._parameters.get("bias")
        if bias is None:
            return y
        return y + bias.to_local(grad_placements=self.parallelized.grad_placements["bias"])  # type: ignore[attr-defined]


class Rowwise(Style):
    """A linear layer split by input features; its input is what a column-wise layer left on this rank.

    Args:
        output_layout: ``"replicate"``: the whole output on every rank. ``"sequence"``: each rank its part of the
            sequence.

    The bias is added once, after the reduction; on parts of the sequence its gradient is a partial sum.

    ===========  ===============  ============  ==============  ===========
    x            weight           y             forward         backward
    ===========  ===============  ============  ==============  ===========
    (b, s, f/t)  (h, f/t)         (b, s, h)     all-reduce
    (b, s, f/t)  (h, f/t)         (b, s/t, h)   reduce-scatter  all-gather
    ===========  ===============  ============  ==============  ===========
    """

    module_class = _RowwiseLinear

    def __init__(self, *, output_layout: Layout = "replicate") -> None:
        self.output_layout = output_layout

    def validate(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            raise ValueError(f"Rowwise takes a torch.nn.Linear, and this is a {type(module).__name__}.")

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        places: dict[str, Placement] = {"weight": Shard(1), "bias": Replicate()}
        return {name: places[name] for name in own_parameters(module) if name in places}

    def partial(self, module: nn.Module) -> frozenset[str]:
        has_bias = "bias" in own_parameters(module)
        return frozenset({"bias"} if has_bias and self.output_layout == "sequence" else ())

    def leave(self, this: Parallelized, y: Tensor) -> Tensor:
        return reduce_scatter(y, this.group) if self.output_layout == "sequence" else reduce(y, this.group)

    def collectives(self) -> tuple[str, str]:
        return ("reduce-scatter", "all-gather") if self.output_layout == "sequence" else ("all-reduce", "")
