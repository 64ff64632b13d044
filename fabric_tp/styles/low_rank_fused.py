from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.styles.attention_heads import set_attributes
from fabric_tp.styles.fused_colwise import FusedColwise, FusedRows
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.low_rank_colwise import DOWN, UP
from fabric_tp.styles.parameters import distribute_parameter, own_parameters
from fabric_tp.styles.style import Held, Parallelized


class _LowRankFused(FusedRows):
    """The module's own forward, on rows of B that are put together from their parts."""

    def take_local(self) -> Held:
        held = super().take_local()
        for name in self.fused_names():
            if name not in self._parameters:
                self._parameters[name] = torch.cat(self.local_parts(name))  # type: ignore[assignment]
                held.append((self, name, None))
        return held


class LowRankFused(FusedColwise):
    """A low-rank adapter around a :class:`FusedColwise` layer: B's rows are those of the parts that it changes.

    Args:
        base: The style of the layer.
        changed: Its parts that the adapter changes.
        heads: Of the attention module.
        query_counts: Attributes of the module that count query heads.
        key_value_counts: Attributes that count key and value heads.
        row_counts: Attributes that list the rows of B of each part.
        row_indices: Buffers that hold the output features that the adapter changes.

    With f for the features of all parts together, and all of them changed:

    =========  ======  ========  ===========  =======  ========  ==================
    x          lora_A  lora_B    y            forward  backward  gradient
    =========  ======  ========  ===========  =======  ========  ==================
    (b, s, h)  (r, h)  (f/t, r)  (b, s, f/t)                     partial: x, lora_A
    =========  ======  ========  ===========  =======  ========  ==================

    Raises:
        ValueError: The changed parts are not the rows of B; or the number of ranks does not divide one of them.

    Example::

        qkv = FusedColwise({"q": 4096, "k": 1024, "v": 1024}, None)
        plan = {"attn.qkv": LowRankFused(qkv, ("q", "v"), Heads(32, 8)), "attn.qkv.linear": qkv}
    """

    module_class = _LowRankFused
    heads: Heads

    def __init__(
        self,
        base: FusedColwise,
        changed: tuple[str, ...],
        heads: Heads,
        *,
        query_counts: tuple[str, ...] = (),
        key_value_counts: tuple[str, ...] = (),
        row_counts: tuple[str, ...] = (),
        row_indices: tuple[str, ...] = (),
    ) -> None:
        parts = {part: rows for part, rows in base.parts.items() if part in changed}
        super().__init__(parts, None, shared={p: h for p, h in base.shared.items() if p in changed})
        self.base, self.changed, self.heads = base, changed, heads
        self.uncut = base.uncut
        self.query_counts, self.key_value_counts = query_counts, key_value_counts
        self.row_counts, self.row_indices = row_counts, row_indices

    def fused(self, module: nn.Module) -> list[str]:
        return [name for name in own_parameters(module) if name == UP]

    def validate(self, module: nn.Module) -> None:
        if UP in own_parameters(module) and sum(self.parts.values()) != module.get_parameter(UP).shape[0]:
            raise ValueError(f"The parts {self.parts} are not the rows of {UP}.")

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {**self._own(module), **super().placements(module)}

    def shapes(self, module: nn.Module) -> Mapping[str, torch.Size]:
        own = {name: module.get_parameter(name).shape for name in self._own(module)}
        return {**own, **super().shapes(module)}

    def covers(self, module: nn.Module) -> frozenset[str]:
        return frozenset(self._own(module)) | super().covers(module)

    def _own(self, module: nn.Module) -> Mapping[str, Placement]:
        """What stays in the module itself."""
        return {name: Replicate() for name in own_parameters(module) if name == DOWN}

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
        for name, placement in self._own(module).items():
            module.register_parameter(name, distribute_parameter(module.get_parameter(name), placement, mesh))
        super().shard(module, mesh)
