"""Transformers' own tensor-parallel plans, beside those that are derived here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ParallelStyle

from fabric_tp.plan import resolve
from fabric_tp.styles import Style

SPLITS = ("colwise", "rowwise")
"""Parts of the names of those of its styles that split a parameter."""


def left_whole(plan: Mapping[str, ParallelStyle], model: nn.Module) -> list[str]:
    """Patterns of the model's own ``tp_plan`` whose parameters it splits, and ``plan`` does not.

    A pattern there is the name of a module or of a parameter, with ``*`` for a number. Those that match nothing in the
    model, such as an MLP's in a mixture of experts, are left out.
    """
    theirs = {name: style for name, style in (getattr(model, "tp_plan", None) or {}).items() if _splits(style)}
    split, parameters = set(_split_parameters(plan, model)), dict(model.named_parameters(remove_duplicate=False))
    missed = []
    for pattern in theirs:
        meant = [name for name in parameters if _means(pattern, name) and parameters[name].dim() > 1]
        if any(name not in split for name in meant):
            missed.append(pattern)
    return missed


def _splits(style: str) -> bool:
    return any(part in style for part in SPLITS)


def _means(pattern: str, parameter: str) -> bool:
    names = parameter.split(".")
    wanted = pattern.split(".")
    return any(
        len(wanted) == len(each) and all(a in ("*", b) for a, b in zip(wanted, each, strict=True))
        for each in (names, names[:-1])
    )


def _split_parameters(plan: Mapping[str, ParallelStyle], model: nn.Module) -> list[str]:
    """Full names, in the model before it is parallelized."""
    found = []
    for pattern, modules in resolve(plan, model):
        style = plan[pattern]
        if not isinstance(style, Style):
            continue
        for path, module in modules:
            # A part of a fused parameter is called "part.name".
            places = style.placements(module).items()
            last = {name.rpartition(".")[2] for name, place in places if isinstance(place, Shard)}
            own = [name for name in style.covers(module) if name.rpartition(".")[2] in last]
            found += [f"{path}.{name}" if path else name for name in own]
    return found
