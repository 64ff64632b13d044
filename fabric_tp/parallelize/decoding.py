"""How a parallelized model generates tokens: one at a time, of which there is no part for each rank."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fabric_tp.architectures import Architecture
from fabric_tp.plan import Plan, TransformerOptions, derive_plan
from fabric_tp.plan.plan import resolve
from fabric_tp.styles import LMHead, Style
from fabric_tp.styles.style import LocalModule


def decoding_plan(
    architecture: Architecture, model: nn.Module, options: TransformerOptions, tensor_parallel_size: int
) -> Plan:
    """The plan without sequence parallelism; logits are computed for the tokens that somebody asks for.

    It splits parameters as the plan with these options does, so that the same parallelized modules can follow both.
    """
    whole = replace(options, sequence_parallel=False, loss_parallel=True, fused_loss=False)
    plan = derive_plan(architecture, model, whole, tensor_parallel_size)
    head = LMHead(fused_loss=True)
    fits = type(plan.get(architecture.head)) is LMHead and head.fits(model.get_submodule(architecture.head))
    return plan | {architecture.head: head} if fits else plan


def set_decoding_styles(plan: Plan, model: nn.Module) -> None:
    """Tell each parallelized module its style in this plan; one without only passes on what it gets."""
    styles = {id(module): plan[pattern] for pattern, modules in resolve(plan, model) for _, module in modules}
    for module in model.modules():
        if isinstance(module, LocalModule):
            style = styles.get(id(module), Style())
            assert isinstance(style, Style)
            module.parallelized.decoding = style


def is_decoding(model: nn.Module) -> bool:
    """Whether it follows the plan of :func:`decoding_plan` now."""
    told = [module.parallelized for module in model.modules() if isinstance(module, LocalModule)]
    return bool(told) and all(this.style is this.decoding for this in told)  # some have one style in both plans
