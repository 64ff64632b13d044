from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.style import Layout, LocalModule, distribute_parameter, own_parameters


class _FusedLinear(LocalModule):
    """Holds its parts as children; the parts' local rows, put together, make one matrix product."""

    def compute(self, x: Tensor) -> Tensor:
        style, placements = self.parallelized.style, self.parallelized.grad_placements
        assert isinstance(style, FusedColwise)
        whole: dict[str, Tensor] = {}
        for name in style.fused_names(self):
            parts = [self.get_parameter(f"{part}.{name}") for part in style.parts]
            locals_ = [part.to_local(grad_placements=placements[name]) for part in parts]  # type: ignore[attr-defined]
            whole[name] = torch.cat(locals_)
        return F.linear(x, whole["weight"], whole.get("bias"))


class FusedColwise(Colwise):
    """A linear layer whose output features are several blocks, one after the other, each split by itself.

    litgpt's ``attn.qkv`` is [Q; K; V]. A contiguous split of its rows would give rank 0 nothing but queries, and no
    DTensor placement means "this rank's rows of three unequal blocks". So the layer is stored as its parts
    (``qkv.q.weight``, ...), each an ordinary row-sharded DTensor, and computed as one.

    Args:
        parts: Rows of each part of the whole layer, in their order.
        input_layout: As in :class:`Colwise`.
    """

    module_class = _FusedLinear

    def __init__(self, parts: Mapping[str, int], *, input_layout: Layout | None = "replicate") -> None:
        super().__init__(input_layout=input_layout)
        self.parts = dict(parts)

    def fused_names(self, module: nn.Module) -> list[str]:
        """Names of the parameters as the unparallelized layer has them."""
        if isinstance(module, _FusedLinear):
            return [name for name, _ in module.get_submodule(next(iter(self.parts))).named_parameters(recurse=False)]
        return list(own_parameters(module))

    def validate(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            raise ValueError(f"FusedColwise takes a torch.nn.Linear, and this is a {type(module).__name__}.")
        if sum(self.parts.values()) != module.weight.shape[0]:
            raise ValueError(f"The parts {self.parts} do not add up to the {module.weight.shape[0]} output features.")

    def divided(self, module: nn.Module) -> Mapping[str, int]:
        return self.parts

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {name: Shard(0) for name in own_parameters(module)}

    def shard(self, module: nn.Module, mesh: DeviceMesh) -> None:
        for part in self.parts:
            module.register_module(part, nn.Module())
        for name in list(own_parameters(module)):
            whole = module.get_parameter(name)
            for part, rows in zip(self.parts, whole.detach().split(list(self.parts.values())), strict=True):
                rows_parameter = nn.Parameter(rows, requires_grad=whole.requires_grad)
                module.get_submodule(part).register_parameter(
                    name, distribute_parameter(rows_parameter, Shard(0), mesh)
                )
            del module._parameters[name]
