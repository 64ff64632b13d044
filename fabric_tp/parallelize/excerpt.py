"""A model with one block of each kind, run in some mode, on some device, or without memory."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def one_of_each_kind(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    kinds: dict[object, nn.Module] = {}
    for block in blocks:
        kinds.setdefault(tuple((name, type(module)) for name, module in block.named_modules()), block)
    return list(kinds.values())


@contextmanager
def with_only(chosen: list[nn.Module], model: nn.Module) -> Iterator[None]:
    """Within it these are all the blocks that the model has."""
    (container,) = (module for module in model.modules() if chosen[0] in module._modules.values())
    held = container._modules
    kept = [(name, module) for name, module in held.items() if module in chosen]
    numbered = isinstance(container, (nn.ModuleList, nn.Sequential))
    container._modules = OrderedDict((str(i) if numbered else name, block) for i, (name, block) in enumerate(kept))  # type: ignore[assignment]
    try:
        yield
    finally:
        container._modules = held


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Within it forwards may set attributes, such as states for the next one; afterwards they are as before."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def on_device(device: torch.device, model: nn.Module) -> Iterator[None]:
    """Within it the parameters are on this device, as the buffers are."""
    away = [(parameter, parameter.data) for parameter in model.parameters() if parameter.device != device]
    for parameter, data in away:
        parameter.data = data.to(device)
    try:
        yield
    finally:
        for parameter, data in away:
            parameter.data = data


def without_memory(
    model: nn.Module, device: torch.device, dtype: torch.dtype | None = None, without: Sequence[nn.Module] = ()
) -> nn.Module:
    """A copy to be made under fake tensors, with other floating-point numbers if ``dtype`` is given.

    Those ``without`` which it is made are missing in their containers; all others keep their names.
    """
    containers = [module for module in model.modules() if any(child in without for child in module._modules.values())]
    held = [(container, container._modules) for container in containers]
    for container, modules in held:
        container._modules = {name: None if child in without else child for name, child in modules.items()}
    try:
        return copy.deepcopy(model, _emptied(model, device, dtype))
    finally:
        for container, modules in held:
            container._modules = modules


def _emptied(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> dict[int, Any]:
    """For the copy: what stands for each tensor of the model."""
    states = [each for module in model.modules() for each in vars(module).values() if isinstance(each, torch.Tensor)]
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers(), *states):  # RecurrentGemma keeps the last forward's states
        other = dtype if tensor.is_floating_point() and dtype else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=other, device=device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return memo
