from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.architectures.linear import features
from fabric_tp.autograd.collectives import Group, Layout
from fabric_tp.autograd.linear import linear
from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.parameters import check_linear, distribute_parameter, output_dim, own_parameters
from fabric_tp.styles.style import LocalModule, Parallelized


class FusedModule(LocalModule):
    """Holds the parts of some of its parameters as children, which have the name of the part."""

    parallelized: Parallelized[Any]

    def fused_names(self) -> list[str]:
        """Names of the parameters that are held in parts, as the unparallelized module has them."""
        prefix = f"{next(iter(self.parallelized.style.parts), None)}."
        return [name.removeprefix(prefix) for name in self.parallelized.shapes if name.startswith(prefix)]

    def part_names(self, name: str) -> list[str]:
        return [f"{part}.{name}" for part in self.parallelized.style.parts]

    def holders(self) -> dict[str, nn.Module]:
        return super().holders() | {f"{part}.": self.get_submodule(part) for part in self.parallelized.style.parts}

    def local_parts(self, name: str) -> list[Tensor]:
        """What this rank computes with of each part, in the forward."""
        return [getattr(self.get_submodule(part), name) for part in self.parallelized.style.parts]


class FusedRows(FusedModule):
    """Of the parts that are keys or values, each rank may compute with other rows than it stores."""

    parallelized: Parallelized[FusedColwise]

    def localize(self, name: str, local: Tensor) -> Tensor:
        this = self.parallelized
        shared = this.style.shared.get(name.split(".")[0])
        if shared is None:
            return super().localize(name, local)
        return shared.select(local, this.group, this.output_dim(local))


class _FusedLinear(FusedRows):
    """The parts' local rows, put together, make one matrix product."""

    def compute(self, x: Tensor) -> Tensor:
        parts = {name: self.local_parts(name) for name in self.fused_names()}
        weights = [self.parallelized.outputs_first(weight) for weight in parts["weight"]]
        return linear(x, weights, parts.get("bias", ()))


class FusedColwise(Colwise):
    """A linear layer whose output features are several blocks, one after the other, each split by itself.

    litgpt's ``attn.qkv`` is [Q; K; V]. A contiguous split of its rows would give rank 0 nothing but queries, and no
    DTensor placement means "this rank's rows of three unequal blocks". So the layer is stored as its parts
    (``qkv.q.weight``, ...), each an ordinary DTensor, and computed as one.

    Args:
        parts: Rows of each part of the whole layer, in their order.
        input_layout: As in :class:`Colwise`.
        shared: Parts that are keys or values of fewer heads than there are ranks; as in :class:`SharedHeads`, they are
            whole on every rank.
        heads: As in :class:`Colwise`, of each part that is not shared.
        regather: As in :class:`Colwise`.

    With f for the features of all parts together:

    ===============  ===========  ========  ===========  ==========  ==========================  ==========
    input_layout     x            weight    y            forward     backward                    gradient
    ===============  ===========  ========  ===========  ==========  ==========================  ==========
    ``"replicate"``  (b, s, h)    (f/t, h)  (b, s, f/t)              all-reduce
    ``"sequence"``   (b, s/t, h)  (f/t, h)  (b, s, f/t)  all-gather  all-gather, reduce-scatter
    ``None``         (b, s, h)    (f/t, h)  (b, s, f/t)                                          partial: x
    ===============  ===========  ========  ===========  ==========  ==========================  ==========

    Raises:
        ValueError: The module is no linear layer, or the parts are not its rows; the number of ranks does not divide
            a part.

    Example::

        plan = {"attn.qkv": FusedColwise({"q": 4096, "k": 1024, "v": 1024}), "attn.proj": Rowwise()}
    """

    module_class: ClassVar[type[LocalModule]] = _FusedLinear

    def __init__(
        self,
        parts: Mapping[str, int],
        input_layout: Layout | None = "replicate",
        *,
        shared: Mapping[str, Heads] | None = None,
        heads: Heads | None = None,
        regather: bool = True,
    ) -> None:
        super().__init__(input_layout, regather=regather, heads=heads)
        self.parts = dict(parts)
        self.shared = dict(shared or {})

    def fused(self, module: nn.Module) -> list[str]:
        """Names of the module's own parameters that are to be held in parts."""
        return list(own_parameters(module))

    def validate(self, module: nn.Module) -> None:
        check_linear("FusedColwise", module)
        _, outputs = features(module)
        if sum(self.parts.values()) != outputs:
            raise ValueError(f"The parts {self.parts} do not add up to the {outputs} output features.")

    def divided(self, module: nn.Module) -> Mapping[str, int]:
        return {} if self.uncut else {part: rows for part, rows in self.parts.items() if part not in self.shared}

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        names = self.fused(module)
        return {f"{part}.{name}": self.part_placement(module, part, name) for part in self.parts for name in names}

    def shapes(self, module: nn.Module) -> Mapping[str, torch.Size]:
        shapes: dict[str, torch.Size] = {}
        for part, rows in self.parts.items():
            for name in self.fused(module):
                shape = list(module.get_parameter(name).shape)
                shape[self.fused_dim(module, name)] = rows
                shapes[f"{part}.{name}"] = torch.Size(shape)
        return shapes

    def covers(self, module: nn.Module) -> frozenset[str]:
        return frozenset(self.fused(module))

    def fused_dim(self, module: nn.Module, name: str) -> int:
        """Along which the parts of a parameter lie one after the other."""
        return output_dim(module) if name == "weight" else 0

    def part_placement(self, module: nn.Module, part: str, name: str) -> Placement:
        return Replicate() if part in self.shared else Shard(self.fused_dim(module, name))

    def local_rows(self, group: Group) -> dict[str, int]:
        """Rows of each part that a rank computes."""

        def own(rows: int) -> int:
            return self.uncut.local_features(rows, group.size) if self.uncut else rows // group.size

        rows = {part: own(whole) for part, whole in self.parts.items()}
        for part, heads in self.shared.items():
            rows[part] = self.parts[part] // heads.key_value * heads.local_key_value(group.size)
        return rows

    def partial(self, module: nn.Module) -> frozenset[str]:
        return frozenset(f"{part}.{name}" for part in self.shared for name in self.fused(module))

    def prepare(self, module: nn.Module, this: Parallelized) -> None:
        module.out_features = sum(self.local_rows(this.group).values())  # type: ignore[assignment]

    def shard(self, module: nn.Module, mesh: DeviceMesh) -> None:
        fused = self.fused(module)
        if not fused:
            return
        for part in self.parts:
            module.register_module(part, nn.Module())
        for name in fused:
            whole, dim = module.get_parameter(name), self.fused_dim(module, name)
            for part, values in zip(self.parts, whole.detach().split(list(self.parts.values()), dim), strict=True):
                parameter = nn.Parameter(values, requires_grad=whole.requires_grad)
                module.get_submodule(part).register_parameter(
                    name, distribute_parameter(parameter, self.part_placement(module, part, name), mesh)
                )
            del module._parameters[name]


class FusedPart(NamedTuple):
    """What one parameter is a part of."""

    whole: str
    """Name of the whole parameter, as the unparallelized model has it."""
    dim: int
    """Along which the parts lie one after the other."""


def fused_parameters(model: nn.Module) -> dict[str, FusedPart]:
    """Each part of a fused parameter by its name; parts in their order."""
    return {
        f"{path}.{part}": FusedPart(f"{path}.{name}", module.parallelized.style.fused_dim(module, name))
        for path, module in model.named_modules()
        if isinstance(module, FusedModule)
        for name in module.fused_names()
        for part in module.part_names(name)
    }
