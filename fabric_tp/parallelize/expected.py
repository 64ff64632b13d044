"""What a model computes before it is divided: its embedding, a block of each kind and its head, on a small input."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fabric_tp.parallelize.arguments import needed_arguments, sample_arguments
from fabric_tp.parallelize.draws import Draw, Draws, Place
from fabric_tp.parallelize.excerpt import attributes_kept, in_mode, on_device, one_of_each_kind, with_only
from fabric_tp.parallelize.layouts import Shapes


class CannotRun(Exception):
    """No arguments could be made up with which the whole model runs."""


@dataclass(frozen=True)
class Expected:
    """What the whole model gave, and to what."""

    arguments: dict[str, Any]
    blocks: list[nn.Module]
    """One of each kind, as they were; all that ran."""
    outputs: dict[str, Tensor]
    """By the names of modules, in the order in which they ran; the model's own last, as ``""``."""
    shapes: Shapes
    draws: list[Draw]
    """What is drawn in training."""

    def without_memory(self, model: nn.Module, fake: nn.Module, dtype: torch.dtype | None) -> Expected:
        """The same of a copy of the model, under fake tensors; floating-point numbers are others if so given."""
        names = dict(fake.named_modules())
        copies = {module: names[name] for name, module in model.named_modules() if name in names}

        def emptied(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            other = dtype if dtype and value.is_floating_point() else value.dtype
            return torch.empty(value.shape, dtype=other, device=value.device)

        return Expected(
            arguments=tree_map(emptied, self.arguments),
            blocks=[copies[block] for block in self.blocks],
            outputs=tree_map(emptied, self.outputs),
            shapes={copies[module]: shape for module, shape in self.shapes.items()},
            draws=self.draws,
        )


def expect(model: nn.Module, blocks: Sequence[nn.Module], size: int, device: torch.device) -> Expected:
    """Run the whole model on a small input, of a length that ``size`` ranks divide.

    Raises:
        CannotRun: It runs with none of the arguments that were tried.
    """
    chosen, errors = one_of_each_kind(blocks), []
    for arguments in sample_arguments(model, size, device):
        shapes: Shapes = {}
        try:
            with with_only(chosen, model), on_device(device, model):
                outputs = run(model, chosen, arguments, shapes)
                return Expected(arguments, chosen, outputs, shapes, _draws(model, chosen, arguments, device))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
    needed = ", ".join(needed_arguments(model)) or "arguments without names"
    raise CannotRun(f"its forward takes {needed}" + (f" and ends in {errors[-1]}" if errors else ""))


def run(
    model: nn.Module,
    chosen: list[nn.Module],
    arguments: dict[str, Any],
    shapes: Shapes,
    at: Place | None = None,
    training: bool = False,
) -> dict[str, Tensor]:
    """Outputs of the chosen modules and of the model; ``shapes`` gets those of all modules' outputs.

    On an error ``at`` ends with the module that it happened in.
    """
    outputs: dict[str, Tensor] = {}
    at = [] if at is None else at
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: object) -> None:
        at.append((names.get(module, ""), module))

    def leave(module: nn.Module, args: object, output: Any) -> None:
        at.pop()
        leaf = next((each for each in tree_leaves(output) if isinstance(each, Tensor)), None)
        if leaf is not None:
            shapes[module] = leaf.shape
        if module in chosen:
            outputs.setdefault(names[module], first_tensor(output))

    with attributes_kept(model), in_mode(model, training), torch.no_grad():
        hooks = [module.register_forward_pre_hook(enter, prepend=True) for module in model.modules()]
        hooks += [module.register_forward_hook(leave) for module in model.modules()]
        try:
            output = model(**arguments)
        finally:
            for hook in hooks:
                hook.remove()
    return {**outputs, "": first_tensor(output)}


def _draws(model: nn.Module, chosen: list[nn.Module], arguments: dict[str, Any], device: torch.device) -> list[Draw]:
    at: Place = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), Draws(at) as draws, suppress(Exception):  # training may need other arguments
        run(model, chosen, arguments, {}, at, training=True)
    return draws.found


def first_tensor(output: Any) -> Tensor:
    """The logits, first of all that a model returns."""
    logits = getattr(output, "logits", None)
    return logits if logits is not None else next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
