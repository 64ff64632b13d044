"""The styles of an attention module, by names within it."""

from __future__ import annotations

from fabric_tp.architectures import Attention
from fabric_tp.architectures.heads import AdaptedHeads
from fabric_tp.autograd.collectives import Layout
from fabric_tp.plan.dropouts import inner_dropouts
from fabric_tp.plan.found import FoundAttention, FusedLinear
from fabric_tp.plan.layers import Styles, adapted_colwise, colwise_styles, norm_of_all, qk_norm, rowwise_styles
from fabric_tp.plan.options import TransformerOptions, layout_of
from fabric_tp.styles import (
    Colwise,
    FusedColwise,
    Heads,
    LowRankFused,
    RandomHeads,
    Replicated,
    ShardHeads,
    SharedHeads,
)


def attention_styles(
    found: FoundAttention, described: Attention, options: TransformerOptions, layout: Layout | None, size: int
) -> Styles:
    """Of an attention that is split by heads.

    Raises:
        ValueError: Its fused projection lies in groups that the number of ranks does not divide.
    """
    heads = Heads(found.heads.query, found.heads.key_value)
    shared = None if heads.splits_key_value(size) else heads
    uncut = uncut_heads(found, size)
    colwise = Colwise(None, heads=uncut)
    plan: Styles = {
        "": (RandomHeads if found.draws else ShardHeads)(
            heads,
            layout,
            query_counts=found.query_counts,
            key_value_counts=found.key_value_counts,
            group_sizes=found.group_sizes,
            head_features=found.head_features,
            per_query_head=found.per_query_head,
            key_value_input=found.key_value_input,
            per_head_arguments=described.per_head_arguments,
            measures_input=found.measures_input,
            same_input=described.same_input,
            returned=found.returned,
            returned_layout=layout_of(options),
            regather=options.regather,
        )
    }
    for fused in found.fused:
        plan |= _fused_heads(fused, heads, shared, uncut, described.adapted)
    plan |= colwise_styles(found.queries, colwise)
    for layer in found.keys_values:
        style = SharedHeads(shared, None) if shared else colwise
        plan |= adapted_colwise(layer, style) if layer.base else {layer.name: style}
    plan |= {norm.name: qk_norm(norm, found.heads.size, None, uncut) for norm in found.query_norms}
    plan |= {norm.name: qk_norm(norm, found.heads.size, shared, uncut) for norm in found.key_norms}
    plan |= {name: Replicated(partial_gradient=True) for name in found.whole}
    plan |= {norm.name: norm_of_all(norm, None, uncut) for norm in found.output_norms}
    plan |= rowwise_styles(found.outputs, layout, uncut=uncut)
    inputs = (*found.queries, *found.keys_values)
    return plan | inner_dropouts(found, inputs, layout, size, uncut)


def uncut_heads(found: FoundAttention, size: int) -> Heads | None:
    """The heads, where their features cannot be split as any others are."""
    heads = Heads(found.heads.query, found.heads.key_value)
    return None if heads.splits_evenly(size) else heads


def _fused_heads(
    fused: FusedLinear, heads: Heads, shared: Heads | None, uncut: Heads | None, adapted: AdaptedHeads | None
) -> Styles:
    if fused.layout == "by_group":
        if shared:
            raise ValueError(
                f"tensor_parallel_size does not divide the {heads.key_value} groups of query heads by which the rows"
                f" of {fused.name} lie. Its divisors work; replicate_attention=True leaves the attention whole."
            )
        colwise = Colwise(None, heads=uncut)
        return adapted_colwise(fused, colwise) if fused.base else {fused.name: colwise}
    sharing: dict[str, Heads] = {part: shared for part in ("k", "v") if shared and part in fused.parts}
    base = FusedColwise(fused.parts, None, shared=sharing, heads=uncut)
    if not fused.base:
        return {fused.name: base}
    if fused.down or adapted is None:
        return adapted_colwise(fused, base)
    adapter = LowRankFused(
        base,
        fused.changed,
        heads,
        query_counts=adapted.query_counts,
        key_value_counts=adapted.key_value_counts,
        row_counts=adapted.row_counts if fused.changed else (),
        row_indices=adapted.row_indices if fused.changed else (),
    )
    return {fused.name: adapter, fused.base: base}
