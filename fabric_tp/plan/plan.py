"""A plan as a whole: what its patterns mean, whether it can be right, how it is applied, and what it looks like."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

from fabric_tp.autograd.padding import Padding
from fabric_tp.styles import Style
from fabric_tp.styles.parameters import own_parameters
from fabric_tp.styles.style import LocalModule

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

Plan = dict[str, ParallelStyle]
"""Styles by the name of the module they are for; ``*`` stands for one part of a name, or for some of its characters
(``"layers.*.attention.wq"``)."""


def resolve(plan: Mapping[str, ParallelStyle], model: nn.Module) -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    """Each pattern of the plan with the modules that it means."""
    named = list(model.named_modules())
    for pattern in plan:
        parts = pattern.split(".") if pattern else []
        yield pattern, [(name, module) for name, module in named if _match(name.split(".") if name else [], parts)]


def _match(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(map(_match_part, name, pattern))


def _match_part(name: str, pattern: str) -> bool:
    """``*`` stands for any characters, and all else for itself: a ModuleDict may have keys like ``[0]``."""
    if "*" not in pattern:
        return name == pattern
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def check_plan(
    plan: Mapping[str, ParallelStyle], model: nn.Module, tensor_parallel_size: int, derived_from: str = ""
) -> None:
    """Raise ValueError if the plan cannot be right for the model on so many ranks, before anything is sharded.

    ``derived_from`` describes the architecture from which the plan was derived, if it was.

    Raises:
        ValueError: A pattern matches no module, or two match the same; a style does not fit its module; a size is not
            divisible, with the sizes that work; a parameter is covered by no style.
    """
    matched = dict(resolve(plan, model))
    if unmatched := [pattern for pattern, modules in matched.items() if not modules]:
        names = ", ".join(name for name, _ in list(model.named_modules())[1:9])
        raise ValueError(f"The plan's {unmatched} match no module of the model. Its modules are called {names}, ...")
    _check_overlap(matched)
    divided: dict[str, Mapping[str, int]] = {}
    for pattern, modules in matched.items():
        style = plan[pattern]
        if isinstance(style, Style):
            for name, module in modules:
                try:
                    style.validate(module)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
                style.check_rounded(name, module, tensor_parallel_size)
                divided[name] = style.divided(module)
    _check_sizes(divided, tensor_parallel_size)
    _check_coverage(plan, matched, model, derived_from)
    if tensor_parallel_size > 1:
        _check_dropouts(matched, model)


def _check_overlap(matched: Mapping[str, list[tuple[str, nn.Module]]]) -> None:
    owners: dict[str, str] = {}
    for pattern, modules in matched.items():
        for name, _ in modules:
            if (other := owners.setdefault(name, pattern)) != pattern:
                raise ValueError(
                    f"The plan's {other!r} and {pattern!r} both match {name or 'the model'}; a module has one style."
                )


def _check_sizes(divided: Mapping[str, Mapping[str, int]], tensor_parallel_size: int) -> None:
    for name, numbers in divided.items():
        wrong = {what: number for what, number in numbers.items() if number % tensor_parallel_size}
        if wrong:
            common = math.gcd(*(number for numbers in divided.values() for number in numbers.values()))
            sizes = [str(size) for size in range(1, common + 1) if common % size == 0]
            works = ", ".join([*sizes[:12], "..."] if len(sizes) > 12 else sizes)
            shown = ", ".join(f"{what}={number}" for what, number in wrong.items())
            raise ValueError(
                f"tensor_parallel_size={tensor_parallel_size} does not divide {shown} of {name or 'the model'}. Each"
                f" rank must get equal shards; the sizes that work for this model are {works}."
            )


def _check_coverage(
    plan: Mapping[str, ParallelStyle],
    matched: Mapping[str, list[tuple[str, nn.Module]]],
    model: nn.Module,
    derived_from: str,
) -> None:
    covered: set[str] = set()
    for pattern, modules in matched.items():
        for name, module in modules:
            covered |= {f"{name}.{own}" if name else own for own in covers(plan[pattern], module)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if missing := sorted(parameters.keys() - covered):
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        stacked = next((name for name in missing if parameters[name].dim() == 3), None)
        advice = "Add their modules to the plan; fabric_tp.styles.Replicated() keeps a module whole on every rank."
        if derived_from:
            advice = f"They are not part of {derived_from}; fabric_tp.from_plan() takes a plan of yours."
        if stacked:
            advice += f" No style splits a parameter of 3 dimensions, such as all experts in {stacked}."
        raise ValueError(f"No style of the plan covers the parameters {', '.join(missing[:4])}{more}. {advice}")


def _check_dropouts(matched: Mapping[str, list[tuple[str, nn.Module]]], model: nn.Module) -> None:
    """Ranks that draw masks of their own would drop different elements of what they all hold."""
    covered = {name for modules in matched.values() for name, _ in modules}
    for name, module in model.named_modules():
        if isinstance(module, DROPOUTS) and module.p > 0 and name not in covered:
            raise ValueError(
                f"No style of the plan covers {name}, a {type(module).__name__} with p={module.p}. fabric_tp.styles."
                "Dropout(layout) makes the masks of an nn.Dropout fit on all ranks; for other kinds of dropout there is"
                " no style: set their p to 0."
            )


def covers(style: ParallelStyle, module: nn.Module) -> frozenset[str]:
    """Names of the parameters of the module, before it is parallelized, that the style takes care of."""
    if isinstance(style, Style):
        return style.covers(module)
    if isinstance(style, (PrepareModuleInput, PrepareModuleInputOutput, PrepareModuleOutput)):
        return frozenset()
    if isinstance(style, (ColwiseParallel, RowwiseParallel, SequenceParallel)):
        return frozenset(own_parameters(module))
    return frozenset(name for name, _ in module.named_parameters(remove_duplicate=False))


def apply_plan(plan: Mapping[str, ParallelStyle], model: nn.Module, mesh: DeviceMesh) -> None:
    """Parallelize each module of the plan; parameters that were one before are one afterwards."""
    tied = tied_parameters(model)
    for pattern, modules in list(resolve(plan, model)):
        for _, module in modules:
            plan[pattern]._apply(module, mesh)
    tie(model, tied)
    padding = Padding()
    for module in model.modules():
        if isinstance(module, LocalModule):
            module.parallelized.padding = padding


def tied_parameters(model: nn.Module) -> list[list[str]]:
    """Groups of names of parameters that are the same object."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def tie(model: nn.Module, groups: list[list[str]]) -> None:
    for first, *others in groups:
        parameter = model.get_parameter(first)
        for name in others:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_parameter(leaf, parameter)
