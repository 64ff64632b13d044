"""Modules by their paths."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Any

from torch import nn


def class_path(model: nn.Module) -> str:
    """The module and the name of its class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def by_class(table: Mapping[str, str], model: nn.Module) -> Any:
    """What a table has for the class of a model, parallelized or not, or for one that it inherits from.

    The table leads from import paths of classes to those of what is wanted, ``"package.module:NAME"``. None if it has
    nothing.
    """
    paths = [f"{each.__module__}.{each.__qualname__}" for each in type(model).__mro__]
    found = next((table[path] for path in paths if path in table), None)
    return pkgutil.resolve_name(found) if found else None


def has(module: nn.Module, path: str) -> bool:
    """Whether there is a submodule at ``path``, and by that name: PEFT's models answer to those of the one in them.

    litgpt's blocks hold ``None`` for a norm that they share.
    """
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = found._modules.get(name) if found is not None else None
    return found is not None


def children(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """The blocks by their full names."""
    if not has(model, path):
        return {}
    return {f"{path}.{name}" if path else name: child for name, child in model.get_submodule(path).named_children()}


def modules_with(model: nn.Module, *layers: tuple[str, ...]) -> list[str]:
    """Full names of all modules that have all these layers."""
    needed = [layer for each in layers for layer in each]
    return [name for name, module in model.named_modules() if all(has(module, layer) for layer in needed)]
