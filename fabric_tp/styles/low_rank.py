"""Low-rank adapters (LoRA, Hu et al. 2021) around a linear layer: A and B are split as their base layer is.

The base layer is a child with a style of its own, which leaves input and output to the adapter around it.

==========  ============  ============  =========================================
base        A             B             partial gradients
==========  ============  ============  =========================================
column-wise (r, h)        (f/t, r)      of A: each rank uses it for its own rows
row-wise    (r, f/t)      (h, r)        of B: each rank feeds it a part of the sum
==========  ============  ============  =========================================
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.fused import FusedColwise, FusedModule
from fabric_tp.styles.head import LMHead
from fabric_tp.styles.heads import Heads, set_attributes
from fabric_tp.styles.rowwise import leave_sharded, leaving
from fabric_tp.styles.style import Held, Layout, Parallelized, Style, own_parameters

DOWN, UP = "lora_A", "lora_B"


class LowRankColwise(Colwise):
    """Around a :class:`Colwise` layer."""

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return _placements(module, down=Replicate(), up=Shard(0))

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset({DOWN} & set(own_parameters(module)))


class LowRankHead(LMHead):
    """Around a :class:`Colwise` layer to the vocabulary; its output as in :class:`LMHead`."""

    placements = LowRankColwise.placements
    partial = LowRankColwise.partial


class LowRankRowwise(Style):
    """Around a :class:`Rowwise` layer with ``output_layout=None``: one reduction for base and adapter together."""

    def __init__(self, *, output_layout: Layout | None = "replicate") -> None:
        self.output_layout = output_layout

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return _placements(module, down=Shard(1), up=Replicate())

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset({UP} & set(own_parameters(module)))

    def leave(self, this: Parallelized, y: Tensor) -> Tensor:
        return leave_sharded(this, y, self.output_layout)

    def collectives(self) -> tuple[str, str]:
        return leaving(self.output_layout)


def _placements(module: nn.Module, *, down: Placement, up: Placement) -> dict[str, Placement]:
    places = {DOWN: down, UP: up}
    return {name: places[name] for name in own_parameters(module) if name in places}


class _LowRankFused(FusedModule):
    """The module's own forward, on rows of B that are put together from their parts."""

    def take_local(self) -> Held:
        held = super().take_local()
        for name in self.fused_names():
            if name not in self._parameters:
                self._parameters[name] = torch.cat(self.local_parts(name))  # type: ignore[assignment]
                held.append((self, name, None))
        return held


class LowRankFused(FusedColwise):
    """Around a :class:`FusedColwise` layer: the rows of B are those of the parts that the adapter changes.

    Args:
        base: The style of the layer.
        changed: Its parts that the adapter changes.
        heads: Of the attention module.
        query_counts: Attributes of the module that count query heads.
        key_value_counts: Attributes that count key and value heads.
        row_counts: Attributes that list the rows of B of each part.
        row_indices: Buffers that hold the output features that the adapter changes.
    """

    module_class = _LowRankFused

    def __init__(
        self,
        base: FusedColwise,
        changed: tuple[str, ...],
        *,
        heads: Heads,
        query_counts: tuple[str, ...] = (),
        key_value_counts: tuple[str, ...] = (),
        row_counts: tuple[str, ...] = (),
        row_indices: tuple[str, ...] = (),
    ) -> None:
        parts = {part: rows for part, rows in base.parts.items() if part in changed}
        super().__init__(parts, shared={p: h for p, h in base.shared.items() if p in changed}, input_layout=None)
        self.base, self.heads = base, heads
        self.query_counts, self.key_value_counts = query_counts, key_value_counts
        self.row_counts, self.row_indices = row_counts, row_indices

    def fused(self, module: nn.Module) -> list[str]:
        return [name for name in own_parameters(module) if name == UP]

    def validate(self, module: nn.Module) -> None:
        if UP in own_parameters(module) and sum(self.parts.values()) != module.get_parameter(UP).shape[0]:
            raise ValueError(f"The parts {self.parts} are not the rows of {UP}.")

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return _placements(module, down=Replicate(), up=Shard(0))

    def partial(self, module: nn.Module) -> frozenset[str]:
        return super().partial(module) | frozenset({DOWN} & set(own_parameters(module)))

    def prepare(self, module: nn.Module, this: Parallelized) -> None:
        values: dict[str, object] = dict.fromkeys(self.query_counts, self.heads.local_query(this.group.size))
        values |= dict.fromkeys(self.key_value_counts, self.heads.local_key_value(this.group.size))
        values |= {name: list(self.local_rows(this.group).values()) for name in self.row_counts}
        set_attributes(module, values)
        rows = self.base.local_rows(this.group)
        features = torch.arange(sum(rows.values()))
        parts = zip(rows, features.split(list(rows.values())), strict=True)
        indices = torch.cat([features[:0], *(part for name, part in parts if name in self.parts)])
        for name in self.row_indices:
            module.register_buffer(name, indices.to(this.mesh.device_type), persistent=False)

    def shard(self, module: nn.Module, mesh: DeviceMesh) -> None:
        super().shard(module, mesh)
        Style.shard(self, module, mesh)
