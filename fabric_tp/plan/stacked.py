"""Parameters that all experts have together: how the modules that hold them are split."""

from __future__ import annotations

from collections.abc import Mapping

from fabric_tp.architectures.architecture import Stacked
from fabric_tp.styles import StackedExperts


def stacked_experts(parameters: Mapping[str, Stacked]) -> StackedExperts:
    """The style of the module that holds them."""
    return StackedExperts(
        {name: each.dim for name, each in parameters.items() if each.dim is not None},
        parts=next((each.parts for each in parameters.values() if each.parts), ()),
        fused=tuple(name for name, each in parameters.items() if each.parts),
        once=tuple(name for name, each in parameters.items() if each.dim is None),
    )


def by_holder(parameters: Mapping[str, Stacked]) -> dict[str, dict[str, Stacked]]:
    """The parameters, by their paths, of each module that holds some."""
    held: dict[str, dict[str, Stacked]] = {}
    for path, parameter in parameters.items():
        holder, _, name = path.rpartition(".")
        held.setdefault(holder, {})[name] = parameter
    return held


def readable(holders: Mapping[str, Mapping[str, Stacked]], experts: str) -> tuple[str, ...]:
    """Of the modules that hold parameters, those whose parameters the experts' own forward may use as they are."""
    return tuple(
        path
        for path, parameters in holders.items()
        if path != experts and not any(each.parts for each in parameters.values())
    )
