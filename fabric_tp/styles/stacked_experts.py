from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.autograd.concatenation import Concatenation
from fabric_tp.styles.fused_colwise import FusedModule
from fabric_tp.styles.parameters import distribute_parameter
from fabric_tp.styles.style import Parallelized, Style


class _StackedExperts(FusedModule):
    """The module's own forward, with its parameters put together from this rank's parts."""

    parallelized: Parallelized[StackedExperts]  # type: ignore[assignment]

    def localize(self, name: str, local: Tensor) -> Tensor:
        this = self.parallelized
        return local * 0 if name in this.style.once and this.group.rank > 0 else local

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        style = self.parallelized.style
        wholes = {name: Concatenation(self.local_parts(name), style.split[name]) for name in self.fused_names()}
        self._parameters.update({name: whole.whole for name, whole in wholes.items()})  # type: ignore[misc]
        try:
            output = super().compute(*args, **kwargs)
        finally:
            for name in wholes:
                del self._parameters[name]
        for whole in wholes.values():
            whole.free_until_backward(output)
        return output


class StackedExperts(Style):
    """Experts whose weights lie in parameters of three dimensions: each expert is split over all ranks.

    The output is a partial sum, and so is the gradient of the input, as for :class:`Rowwise` and :class:`Colwise` with
    the layout None: a module around both router and experts sums them, :class:`PrepareInputOutput`.

    Args:
        split: For each parameter that is split the dimension of its hidden features.
        parts: Names of the parts, of equal size, that lie one after the other along that dimension in the parameters
            of ``fused``. A contiguous split would give rank 0 nothing but gates, so they are stored as these parts.
        fused: Parameters that consist of such parts.
        once: Parameters that are added to the output: by the first rank only.

    With e experts, f hidden features in each and two parts:

    =========  =================  =============  =================  =======  ========  ===========
    x          gate_up_proj       down_proj      y                  forward  backward  gradient
    =========  =================  =============  =================  =======  ========  ===========
    (b, s, h)  (e, 2 * f/t, h)    (e, h, f/t)    (b, s, h) partial                     partial: x
    =========  =================  =============  =================  =======  ========  ===========

    Raises:
        ValueError: The module lacks a parameter; the number of ranks does not divide one of the dimensions.

    Example::

        experts = StackedExperts({"gate_up_proj": 1, "down_proj": 2}, parts=("gate", "up"), fused=("gate_up_proj",))
        plan = {"mlp": PrepareInputOutput(), "mlp.gate": Replicated(partial_gradient=True), "mlp.experts": experts}
    """

    module_class = _StackedExperts

    def __init__(
        self,
        split: Mapping[str, int],
        *,
        parts: tuple[str, ...] = (),
        fused: tuple[str, ...] = (),
        once: tuple[str, ...] = (),
    ) -> None:
        self.split, self.parts, self.fused, self.once = dict(split), tuple(parts), tuple(fused), tuple(once)

    def validate(self, module: nn.Module) -> None:
        held = module._parameters
        for name in (*self.split, *self.once):
            if held.get(name) is None:
                raise ValueError(f"StackedExperts needs a parameter {name!r}; the module has {', '.join(held)}.")

    def divided(self, module: nn.Module) -> Mapping[str, int]:
        sizes = {name: module.get_parameter(name).shape[dim] for name, dim in self.split.items()}
        return {
            f"{name}.shape[{self.split[name]}]": size // (len(self.parts) if name in self.fused else 1)
            for name, size in sizes.items()
        }

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        places: dict[str, Placement] = {name: Replicate() for name in self.once}
        for name, dim in self.split.items():
            stored = [f"{part}.{name}" for part in self.parts] if name in self.fused else [name]
            places |= {each: Shard(dim) for each in stored}
        return places

    def shapes(self, module: nn.Module) -> Mapping[str, torch.Size]:
        shapes = {name: module.get_parameter(name).shape for name in (*self.once, *self.split)}
        result: dict[str, torch.Size] = {}
        for name in self.placements(module):
            own = name.rpartition(".")[2]
            shape = list(shapes[own])
            if own in self.fused:
                shape[self.split[own]] //= len(self.parts)
            result[name] = torch.Size(shape)
        return result

    def covers(self, module: nn.Module) -> frozenset[str]:
        return frozenset((*self.split, *self.once))

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset(self.once)

    def shard(self, module: nn.Module, mesh: DeviceMesh) -> None:
        for part in self.parts:
            module.register_module(part, nn.Module())
        for name, dim in self.split.items():
            whole = module.get_parameter(name)
            if name not in self.fused:
                module.register_parameter(name, distribute_parameter(whole, Shard(dim), mesh))
                continue
            for part, values in zip(self.parts, whole.detach().chunk(len(self.parts), dim), strict=True):
                parameter = nn.Parameter(values, requires_grad=whole.requires_grad)
                module.get_submodule(part).register_parameter(name, distribute_parameter(parameter, Shard(dim), mesh))
            del module._parameters[name]
        for name in self.once:
            module.register_parameter(name, distribute_parameter(module.get_parameter(name), Replicate(), mesh))

    def fused_dim(self, module: nn.Module, name: str) -> int:
        return self.split[name]
