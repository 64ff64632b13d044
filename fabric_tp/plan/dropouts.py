"""What a model's dropouts see, and so how their masks are made to fit on all ranks."""

from __future__ import annotations

from fabric_tp.architectures import Architecture
from fabric_tp.autograd.collectives import Layout
from fabric_tp.plan.dropout_rates import Dropouts
from fabric_tp.plan.found import FoundAttention, FoundMLP, FoundTransformer, Linear
from fabric_tp.plan.modules import is_within
from fabric_tp.plan.plan import Plan
from fabric_tp.styles import Dropout, Heads, Style


def check_drawn(found: FoundTransformer) -> None:
    drawn = {**found.drawn, **{key: rate for block in found.blocks.values() for key, rate in block.drawn.items()}}
    if drawn:
        rates = ", ".join(f"{name.rpartition('.')[2]}={rate}" for name, rate in drawn.items())
        raise ValueError(
            f"Without a module, the model's forward drops at the rates {rates}: each rank would drop something else."
            " There is no style for that; set these rates to 0 in the model's config."
        )


def outer_dropouts(architecture: Architecture, dropouts: Dropouts, layout: Layout, ambiguous: bool) -> Plan:
    """Outside of the blocks; ``ambiguous`` if some there see the whole sequence, and some a part of it."""
    plan: Plan = {}
    for name, rate in dropouts.rates.items():
        if any(is_within(name, module) for module in (architecture.head, *architecture.before_blocks)):
            plan[name] = Dropout()
        elif not ambiguous or any(is_within(name, module) for module in architecture.after_blocks):
            plan[name] = Dropout(layout)
        elif rate > 0:
            raise ValueError(
                f"{name} is a Dropout between the embedding, whose output is whole on every rank, and the head,"
                " whose input is not, and which of both it sees is not known. Use sequence_parallel=False, or move"
                " it into the blocks."
            )
    return plan


def inner_dropouts(
    found: FoundAttention | FoundMLP,
    inputs: tuple[Linear, ...],
    layout: Layout | None,
    size: int,
    uncut: Heads | None = None,
) -> dict[str, Style]:
    """Inside attention or an MLP: in adapters, on shards, and on what the row-wise layer made of them."""
    plan: dict[str, Style] = {}
    outputs = {layer.name for layer in found.outputs}
    for name, rate in found.dropouts.rates.items():
        if name in found.dropouts.in_adapters:
            plan[name] = Dropout("features" if any(is_within(name, layer) for layer in outputs) else "replicate")
            continue
        if name in found.output_dropouts:
            plan[name] = Dropout(layout or "replicate")
            continue
        if not found.outputs:  # nor is there what they would have reduced
            plan[name] = Dropout("features")
            continue
        width = found.outputs[0].out_features
        sharded = {layer.in_features for layer in found.outputs} | {layer.out_features for layer in inputs}
        sharded |= {sum(fused.parts.values()) for fused in found.fused}
        on_a_rank = {uncut.local_features(each, size) if uncut else each / size for each in sharded}
        if size == 1 or width not in on_a_rank:
            plan[name] = Dropout("features", reduced_features=width, reduced_layout=layout or "replicate")
        elif rate > 0:
            raise ValueError(
                f"{name} is a Dropout in a {found.class_name} whose hidden features are {width} on each"
                f" of {size} ranks, as many as its output has: which of both the dropout sees is unknown. Say so:"
                " plan = fabric_tp.auto().plan(model, tensor_parallel_size=1); plan[...] = fabric_tp.styles."
                'Dropout("features"), or where it comes last "sequence", or "replicate" without sequence parallelism;'
                " then use fabric_tp.from_plan(plan)."
            )
    return plan
