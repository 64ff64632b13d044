"""What all styles share: how a module keeps DTensor parameters and computes on plain local tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.architectures.linear import Storage, storage
from fabric_tp.autograd.collectives import Group
from fabric_tp.autograd.linear import linear
from fabric_tp.autograd.local import local_part
from fabric_tp.autograd.padding import Padding
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.parameters import distribute_parameter

StyleOf = TypeVar("StyleOf", bound="Style")


@dataclass
class Parallelized(Generic[StyleOf]):
    """What a parallelized module knows about itself."""

    style: StyleOf
    mesh: DeviceMesh
    group: Group
    first_argument: str = ""
    """Name of the forward's first parameter, the activations; empty if it has none that can be used."""
    by_keyword: bool = False
    """The forward takes the first argument by its name only."""
    arguments: tuple[str, ...] = ()
    """Names of the forward's parameters, in their order."""
    storage: Storage | None = None
    """How the weight lies, of a linear layer."""
    partial: frozenset[str] = frozenset()
    """Own replicated parameters of which each rank computes only a part of the gradient."""
    sum_is_deferred: bool = False
    """Somebody sums the partial gradients later, so they leave labelled as what they will then be."""
    grad_placements: dict[str, list[Placement]] = field(default_factory=dict)
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    """Of the whole parameters."""
    padding: Padding | None = None
    """Of the model; None where torch's ``parallelize_module`` applied the style, which knows no model."""
    decoding: Style | None = None
    """The style while tokens are generated; None: the same."""

    def outputs_first(self, weight: Tensor) -> Tensor:
        """A view of a linear layer's weight, with the rows that torch's has."""
        return weight.t() if self.storage == "inputs_first" else weight

    def output_dim(self, parameter: Tensor) -> int:
        """The dimension of a linear layer's weight or bias that its output features lie along."""
        return 1 if self.storage == "inputs_first" and parameter.dim() == 2 else 0

    def defer_sum(self) -> None:
        self.sum_is_deferred = True
        self.grad_placements.update({name: [Replicate()] for name in self.partial})


Held = list[tuple[nn.Module, str, nn.Parameter | None]]
"""Modules, names of their parameters, and the parameters themselves, in whose place something else is at the moment."""


def put_back(held: Held) -> None:
    for module, name, parameter in held:
        if parameter is None:
            del module._parameters[name]
        else:
            module._parameters[name] = parameter


class LocalModule(nn.Module):
    """Mixed into the class of a parallelized module: while its forward runs, parameters are this rank's plain tensors.

    Outside of the forward the parameters are DTensors. So optimizers, clipping, FSDP2 and checkpoints see DTensors,
    and the forward, which is the module's own, sees nothing but local tensors and runs no DTensor operation.
    """

    parallelized: Parallelized[Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        this = self.parallelized
        first = this.first_argument
        if not args and first in kwargs and not this.by_keyword:
            args = (kwargs.pop(first),)  # so that a style's own computation need not know what the module calls it
        if args:
            args = (this.style.enter(this, args[0]), *args[1:])
        elif first in kwargs:
            kwargs[first] = this.style.enter(this, kwargs[first])
        held = self.take_local()
        try:
            output = self.compute(*args, **kwargs)
        finally:
            put_back(held)
        return this.style.leave(this, output)

    def take_local(self) -> Held:
        """Put plain local tensors in the place of the DTensors that this module computes with."""
        held: Held = []
        for prefix, holder in self.holders().items():
            for name, parameter in list(holder._parameters.items()):
                if isinstance(parameter, DTensor):
                    holder._parameters[name] = self.localize(prefix + name, self.local(prefix + name, parameter))  # type: ignore[assignment]
                    held.append((holder, name, parameter))
        for name in self.parallelized.style.reads:
            held += self.get_submodule(name).take_local()  # type: ignore[operator]
        return held

    def local(self, name: str, parameter: Tensor) -> Tensor:
        """This rank's part of a parameter, or what stands in its place already."""
        if not isinstance(parameter, DTensor):
            return parameter
        return local_part(parameter, self.parallelized.grad_placements[name])

    def holders(self) -> dict[str, nn.Module]:
        """The modules that hold the parameters, by what the names of these begin with."""
        return {"": self}

    def localize(self, name: str, local: Tensor) -> Tensor:
        """What of a parameter, as this rank stores it, the forward is to see."""
        this, heads = self.parallelized, self.parallelized.style.uncut
        placement = this.grad_placements[name][0]
        if heads is None or not isinstance(placement, Shard):
            return local
        return heads.complete(local, this.group, placement.dim, this.shapes[name][placement.dim])

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        this = self.parallelized
        if this.storage and len(args) == 1:
            return linear(args[0], [this.outputs_first(self.weight)], [self.bias])  # type: ignore[arg-type, list-item]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class Style(ParallelStyle):
    """How one module is stored and computed on one tensor-parallel rank.

    A subclass says which parameters the module then holds and where each goes (``placements``), which sizes the number
    of ranks must divide (``divided``), and what happens to the first input and to the output (``enter``, ``leave``). It
    can be used in a plan for :class:`fabric_tp.from_plan` or in one for torch's own ``parallelize_module``.

    Of the arguments of a style, what it cannot do without comes first, then how activations lie, both by position or by
    name; all others by name only. Attributes have the names of the arguments.

    Raises:
        ValueError: When it is applied: the module is none that it takes, or the number of ranks does not divide one of
            its sizes.

    Example::

        plan = {"embed": VocabParallelEmbedding(), "mlp.up": Colwise(), "mlp.down": Rowwise(), "lm_head": LMHead()}
        parallelize = fabric_tp.from_plan(plan)
    """

    module_class: ClassVar[type[LocalModule]] = LocalModule
    rounds_up: bool = False
    """Each rank has the next ``ceil(n / t)`` of what is split, and the last one what is left, which must be something.
    Otherwise the number of ranks must divide it."""

    uncut: Heads | None = None
    """Heads whose features are split, where the number of ranks need not divide them: what a rank stores may end within
    a head, and the forward exchanges rows so that it computes with whole ones."""

    reads: tuple[str, ...] = ()
    """Modules inside, with a style of their own, whose parameters the forward of this one may read itself."""

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        """Placement of each parameter that the module, itself or in its own parts, holds when it is parallelized."""
        return {}

    def shapes(self, module: nn.Module) -> Mapping[str, torch.Size]:
        """Whole shape of each parameter in :meth:`placements`."""
        return {name: module.get_parameter(name).shape for name in self.placements(module)}

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Names of the parameters, in the module before it is parallelized, that these are made of."""
        return frozenset(self.placements(module))

    def partial(self, module: nn.Module) -> frozenset[str]:
        """Names of the replicated parameters whose gradient is a partial sum on each rank."""
        return frozenset()

    def divided(self, module: nn.Module) -> Mapping[str, int]:
        """What the number of tensor-parallel ranks must divide, by a name for the error message."""
        return {} if self.rounds_up or self.uncut else self.split_sizes(module)

    def split_sizes(self, module: nn.Module) -> Mapping[str, int]:
        """The sizes of the parameters that are split, by a name for the error message."""
        return {
            f"{name}.shape[{placement.dim}]": self.shapes(module)[name][placement.dim]
            for name, placement in self.placements(module).items()
            if isinstance(placement, Shard)
        }

    def check_rounded(self, name: str, module: nn.Module, size: int) -> None:
        """Refuse a number of ranks that is too much for what is rounded up.

        Raises:
            ValueError: A rank would be left with nothing; or the features that are split are not those of the heads.
        """
        for what, number in self.split_sizes(module).items() if self.rounds_up or self.uncut else ():
            if self.uncut and number % self.uncut.query:
                raise ValueError(f"{what}={number} of {name} are not the features of {self.uncut.query} heads.")
            if self.rounds_up and -(-number // size) * (size - 1) >= number:
                raise ValueError(
                    f"tensor_parallel_size={size} is too much for {what}={number} of {name}: {-(-number // size)} on"
                    f" each rank leave nothing for the last."
                )

    def validate(self, module: nn.Module) -> None:
        """Raise ValueError if this style cannot be right for the module."""

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        return x

    def leave(self, this: Parallelized, y: Any) -> Any:
        return y

    def collectives(self) -> tuple[str, str]:
        """Collectives of the forward and of the backward, for people."""
        return "", ""

    def shard(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """Replace the module's own parameters by DTensors."""
        for name, placement in self.placements(module).items():
            parameter = module.get_parameter(name)
            if not isinstance(parameter, DTensor):
                module.register_parameter(name, distribute_parameter(parameter, placement, mesh))

    def prepare(self, module: nn.Module, this: Parallelized) -> None:
        """Change what the module itself holds, other than its parameters, for one rank."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.validate(module)
        group = Group.of(device_mesh)
        check_divisible(type(module).__name__, self.divided(module), group.size)
        self.check_rounded(type(module).__name__, module, group.size)
        arguments = tuple(inspect.signature(module.forward).parameters)
        this = Parallelized(self, device_mesh, group, *_first_parameter(module), arguments, storage(module))
        this.partial = self.partial(module) if group.size > 1 else frozenset()
        places = self.placements(module).items()
        this.shapes = self.shapes(module)
        this.grad_placements = {name: [Partial() if name in this.partial else place] for name, place in places}
        self.shard(module, device_mesh)
        self.prepare(module, this)
        module.parallelized = this  # type: ignore[assignment]
        module.__class__ = mixed(self.module_class, type(module))
        return module

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def _first_parameter(module: nn.Module) -> tuple[str, bool]:
    """Of the module's own forward: its name, if it can be given by that, and whether it must be."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    first = next(iter(inspect.signature(module.forward).parameters.values()), None)
    if first is None or first.kind not in by_name:
        return "", False
    return first.name, first.kind == inspect.Parameter.KEYWORD_ONLY


_mixed: dict[tuple[type[nn.Module], type], type] = {}


def mixed(mixin: type[nn.Module], cls: type) -> type:
    """``cls`` with the mixin's forward; FSDP2 changes the class of a module in the same way."""
    if (mixin, cls) not in _mixed:
        _mixed[mixin, cls] = type(f"{mixin.__name__}[{cls.__name__}]", (mixin, cls), {"__module__": cls.__module__})
    return _mixed[mixin, cls]


def check_divisible(name: str, divided: Mapping[str, int], size: int) -> None:
    wrong = {what: number for what, number in divided.items() if number % size}
    if wrong:
        numbers = ", ".join(f"{what}={number}" for what, number in wrong.items())
        raise ValueError(f"tensor_parallel_size={size} does not divide {numbers} of {name}.")
