"""Questions to one module, with answers that say what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import nn

from fabric_tp.architectures.names import has

Answer = TypeVar("Answer")


def child(module: nn.Module, name: str) -> nn.Module:
    if not has(module, name):
        held = ", ".join(each for each, _ in module.named_children())
        raise ValueError(f"A {type(module).__name__} has no {name!r}; it has {held}.")
    return module.get_submodule(name)


def ask(question: Callable[[nn.Module], Answer], module: nn.Module) -> Answer:
    """What the architecture reads from a module's attributes."""
    try:
        return question(module)
    except AttributeError as error:
        lacking = type(error.obj).__name__ if error.obj is not module else "It"
        raise ValueError(
            f"How many heads or features a {type(module).__name__} has cannot be told: {lacking} has no {error.name!r}."
        ) from None


def present(module: nn.Module, names: Iterable[str]) -> list[str]:
    return [name for name in names if has_parameters(module, name)]


def has_parameters(module: nn.Module, name: str) -> bool:
    """Where a model has no norm it may have an ``nn.Identity``, or one without parameters."""
    return has(module, name) and any(True for _ in module.get_submodule(name).parameters())


def own(module: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """The parameters that the module holds itself."""
    return tuple(name for name in names if module._parameters.get(name) is not None)


def holders(module: nn.Module, name: str) -> tuple[str, ...]:
    """Paths of the modules within this child, itself included, that own parameters."""
    within = module.get_submodule(name).named_modules()
    return tuple(join(name, path) for path, owner in within if any(True for _ in owner.parameters(recurse=False)))


def all_holders(module: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those within all these children, of which some may be missing."""
    return tuple(path for name in present(module, names) for path in holders(module, name))


def existing(module: nn.Module, paths: tuple[str, ...]) -> tuple[str, ...]:
    """The paths to attributes that hold a number."""
    return tuple(path for path in paths if isinstance(attribute(module, path), int))


def attribute(module: nn.Module, path: str) -> object:
    value: object = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def positive(module: nn.Module, paths: Iterable[str]) -> dict[str, float]:
    """The numbers above 0, by the paths to attributes that hold them."""
    numbers = {path: attribute(module, path) for path in paths}
    return {path: number for path, number in numbers.items() if isinstance(number, (int, float)) and number > 0}


def join(*names: str) -> str:
    return ".".join(filter(None, names))


def is_within(path: str, name: str) -> bool:
    return bool(name) and (path == name or path.startswith(f"{name}."))
