"""Modules that compute the same and keep less for the backward, in the place of a model's own."""

from __future__ import annotations

import pkgutil

from torch import nn

from fabric_tp.styles.style import mixed


def make_lean(model: nn.Module, tables: tuple[str, ...]) -> None:
    """Let the modules whose forward is in a table compute with the class that stands there.

    They change their class in place, nothing else, and have a dictionary in common, ``lean_shared``.

    Args:
        tables: Where they are, as ``"package.module:NAME"``; see :mod:`fabric_tp.architectures.lean`.
    """
    classes = {forward: lean for table in tables for forward, lean in pkgutil.resolve_name(table).items()}
    shared: dict[str, object] = {}
    for module in model.modules():
        if lean := classes.get(type(module).forward):
            module.__class__ = mixed(lean, type(module))
            module.lean_shared = shared  # type: ignore[assignment]
