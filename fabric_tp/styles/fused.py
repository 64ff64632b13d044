from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.style import Layout, LocalModule, distribute_parameter, own_parameters


class _FusedLinear(LocalModule):
    """Holds its parts as children; the parts' local rows, put together, make one matrix product."""

    def compute(self, x: Tensor) -> Tensor:
        style = self.parallelized.style
        assert isinstance(style, FusedColwise)
        whole = {name: torch.cat(list(self._local_parts(name))) for name in style.fused_names(self)}
        return F.linear(x, whole["weight"], whole.get("bias"))

    def _local_parts(self, name: str) -> Iterator[Tensor]:
        this = self.parallelized
        assert isinstance(this.style, FusedColwise)
        for part in this.style.parts:
            parameter = self.get_parameter(f"{part}.{name}")
            assert isinstance(parameter, DTensor)
            local = parameter.to_local(grad_placements=this.grad_placements[f"{part}.{name}"])
            heads = this.style.shared.get(part)
            yield heads.select(local, this.group) if heads else local


class FusedColwise(Colwise):
    """A linear layer whose output features are several blocks, one after the other, each split by itself.

    litgpt's ``attn.qkv`` is [Q; K; V]. A contiguous split of its rows would give rank 0 nothing but queries, and no
    DTensor placement means "this rank's rows of three unequal blocks". So the layer is stored as its parts
    (``qkv.q.weight``, ...), each an ordinary DTensor, and computed as one.

    Args:
        parts: Rows of each part of the whole layer, in their order.
        shared: Parts that are keys or values of fewer heads than there are ranks; as in :class:`SharedHeads`, they are
            whole on every rank.
        input_layout: As in :class:`Colwise`.
    """

    module_class = _FusedLinear

    def __init__(
        self,
        parts: Mapping[str, int],
        *,
        shared: Mapping[str, Heads] | None = None,
        input_layout: Layout | None = "replicate",
    ) -> None:
        super().__init__(input_layout=input_layout)
        self.parts = dict(parts)
        self.shared = dict(shared or {})

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
        return {part: rows for part, rows in self.parts.items() if part not in self.shared}

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        """Of the parameters of the whole layer; see :meth:`part_placement` for what is stored."""
        return {name: Shard(0) for name in own_parameters(module)}

    def part_placement(self, part: str) -> Placement:
        return Replicate() if part in self.shared else Shard(0)

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset(f"{part}.{name}" for part in self.shared for name in own_parameters(module))

    def grad_placements(self, module: nn.Module, partial: frozenset[str]) -> dict[str, list[Placement]]:
        names = [(part, f"{part}.{name}") for part in self.parts for name in own_parameters(module)]
        return {name: [Partial() if name in partial else self.part_placement(part)] for part, name in names}

    def shard(self, module: nn.Module, mesh: DeviceMesh) -> None:
        for part in self.parts:
            module.register_module(part, nn.Module())
        for name in list(own_parameters(module)):
            whole = module.get_parameter(name)
            for part, rows in zip(self.parts, whole.detach().split(list(self.parts.values())), strict=True):
                parameter = nn.Parameter(rows, requires_grad=whole.requires_grad)
                module.get_submodule(part).register_parameter(
                    name, distribute_parameter(parameter, self.part_placement(part), mesh)
                )
            del module._parameters[name]


def fused_parameters(model: nn.Module) -> dict[str, str]:
    """Name of each part of a fused parameter, with the name of the whole; parts in their order."""
    return {
        f"{name}.{part}.{own}": f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, LocalModule) and isinstance(style := module.parallelized.style, FusedColwise)
        for own in style.fused_names(module)
        for part in style.parts
    }
