"""An optimizer whose model is parallelized after it was made."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from fabric_tp.styles.fused_colwise import fused_parameters


def names_of_parameters(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of the parameters in each of the optimizer's groups."""
    if optimizer.state:
        raise ValueError(
            f"This {type(optimizer).__name__} has already taken a step or loaded a state, for parameters that are about"
            " to be replaced. Set the model up first, make the optimizer from its parameters, and load the state then."
        )
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = [group["params"] for group in optimizer.param_groups]
    if any(parameter not in names for group in groups for parameter in group):
        raise ValueError(
            f"This {type(optimizer).__name__} has parameters that are not the model's. Give fabric.setup() the model"
            " that they belong to, or set up the model alone and then the optimizer: fabric.setup_optimizers()."
        )
    return [[names[parameter] for parameter in group] for group in groups]


def repoint(module: nn.Module, optimizer: Optimizer, names: list[list[str]]) -> None:
    """Put the module's present parameters in the place of those that had these names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    parts: dict[str, list[str]] = {}
    for part, of in fused_parameters(module).items():
        parts.setdefault(of.whole, []).append(part)
    for group, old in zip(optimizer.param_groups, names, strict=True):
        new = [part for name in old for part in parts.get(name, [name])]
        missing = [name for name in new if name not in parameters]
        if missing:
            raise ValueError(
                f"parallelize_fn has renamed {missing[0]}, so the optimizer cannot follow. Set up the model alone, make"
                " the optimizer from its parameters, and set that up with fabric.setup_optimizers()."
            )
        group["params"] = [parameters[name] for name in new]
        if "param_names" in group:
            group["param_names"] = new
