"""From what a model has to its plan: functions of plain data, none of which sees the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fabric_tp.architectures import Architecture, Block
from fabric_tp.architectures.heads import AdaptedHeads
from fabric_tp.autograd.collectives import Layout
from fabric_tp.plan.dropouts import check_drawn, inner_dropouts, outer_dropouts
from fabric_tp.plan.found import (
    FoundAttention,
    FoundBlock,
    FoundExperts,
    FoundTransformer,
    FusedLinear,
)
from fabric_tp.plan.inspection import inspect_feed_forwards, inspect_transformer
from fabric_tp.plan.layers import (
    COLWISE,
    Styles,
    colwise_styles,
    feed_forward_styles,
    hidden_styles,
    layer_styles,
    norm_of_all,
    qk_norm,
    rowwise_styles,
    under,
)
from fabric_tp.plan.mixers import refuse_mixers, whole_styles
from fabric_tp.plan.modules import attribute, join
from fabric_tp.plan.options import TransformerOptions, layout_of
from fabric_tp.plan.plan import Plan
from fabric_tp.plan.stacked import readable, stacked_experts
from fabric_tp.styles import (
    Colwise,
    Dropout,
    FusedColwise,
    GatherOutput,
    HeadBias,
    Heads,
    LMHead,
    LowRankColwise,
    LowRankFused,
    LowRankHead,
    ParallelResidual,
    PrepareInputOutput,
    RandomHeads,
    RandomReplicated,
    Replicated,
    ScatterInput,
    ShardHeads,
    SharedHeads,
    VocabParallelEmbedding,
)

BALANCE = (
    "adds a loss of the routers' outputs. Each rank would compute all of it, and its gradient would count once for each"
    " rank. Leave it out."
)


def derive_plan(
    architecture: Architecture, model: nn.Module, options: TransformerOptions, tensor_parallel_size: int
) -> Plan:
    """The plan for a transformer of this architecture.

    Raises:
        ValueError: The model lacks modules of the architecture, or what a dropout sees is not known.
    """
    found = inspect_transformer(architecture, model)
    assert architecture.block is not None
    layout = layout_of(options)
    if tensor_parallel_size > 1:
        check_drawn(found)
        _check_balance(architecture, found, model)
        _check_pieces(found, layout)
        if not options.replicate_attention:
            refuse_mixers({name: block.mixers for name, block in found.blocks.items()})
    measured = architecture.measures_embedding and options.sequence_parallel
    plan: Plan = {architecture.embedding: VocabParallelEmbedding("replicate" if measured else layout)}
    if measured:
        plan[next(iter(found.blocks))] = ScatterInput()
    hybrid = any(block.mixers for block in found.blocks.values())
    deriver = _Deriver(options, tensor_parallel_size, architecture.block, hybrid)
    plan |= _blocks(architecture.blocks, found.blocks, deriver)
    plan |= {name: Replicated("replicate") for name in found.before}
    plan |= {name: Replicated(layout) for name in found.after}
    plan |= {architecture.head_bias: HeadBias()} if found.has_head_bias else {}
    before_head = layout
    if architecture.measures_output and options.sequence_parallel:
        plan[architecture.norm], before_head = GatherOutput(), "replicate"
    if found.head.base:
        head: LMHead = LowRankHead(before_head, loss_parallel=options.loss_parallel)
    else:
        head = LMHead(
            before_head, regather=options.regather, loss_parallel=options.loss_parallel, fused_loss=options.fused_loss
        )
    plan |= layer_styles(found.head, head, COLWISE)
    for name, inner in found.whole.items():  # all ranks see the same and compute the same, random numbers included
        reads = tuple(path.removeprefix(f"{name}.") for path in inner if path != name)
        plan |= {**dict.fromkeys(inner, Replicated()), name: RandomReplicated(reads=reads)}
    plan |= dict.fromkeys(found.whole_dropouts.rates, Dropout())
    return plan | outer_dropouts(architecture, found.dropouts, layout, measured and tensor_parallel_size > 1)


def _check_balance(architecture: Architecture, found: FoundTransformer, model: nn.Module) -> None:
    options = {name: attribute(model, f"config.{name}") for name in architecture.balances_experts}
    if (given := [name for name, on in options.items() if on]) and any(each.experts for each in found.blocks.values()):
        raise ValueError(f"config.{given[0]}={options[given[0]]} {BALANCE}")


def _check_pieces(found: FoundTransformer, layout: Layout) -> None:
    for name, block in found.blocks.items():
        for path, length in block.pieces.items() if layout == "sequence" else ():
            raise ValueError(
                f"{name} cuts the sequence into pieces ({path}={length}), and each rank would cut its own part of it."
                " Set it to 0 in the model's config, or use sequence_parallel=False."
            )


def derive_feed_forward_plan(architecture: Architecture, model: nn.Module, tensor_parallel_size: int) -> Plan:
    """The plan for a module that contains MLPs of this architecture; input and output of each are whole.

    Raises:
        ValueError: There is no such MLP, or what a dropout sees is not known.
    """
    found, dropouts = inspect_feed_forwards(architecture, model)
    plan: Plan = {name: Dropout() for name in dropouts.rates}
    for name, mlp in found.items():
        plan |= under(name, feed_forward_styles(mlp, "replicate", tensor_parallel_size))
    return plan


def _blocks(path: str, found: dict[str, FoundBlock], deriver: _Deriver) -> Plan:
    """One pattern for all blocks if they are alike; otherwise each block by its name."""
    first, *others = found.values()
    if all(other == first for other in others):
        return dict(under(f"{path}.*", deriver.block(first)))
    return {name: style for path, each in found.items() for name, style in under(path, deriver.block(each)).items()}


@dataclass(frozen=True)
class _Deriver:
    """The plan of one block, by paths from it."""

    options: TransformerOptions
    size: int
    described: Block
    hybrid: bool
    """Some blocks have mixers that split in no way, and these are what is to be whole."""

    def block(self, found: FoundBlock) -> Styles:
        options, layout = self.options, layout_of(self.options)
        plan: Styles = {name: Replicated(layout) for name in found.norms}
        dropouts = {name: Dropout(layout) for name in found.dropouts.rates}
        # A dropout between attention or MLP and the residual belongs to one of them: they cannot share a reduction.
        norm = None if options.replicate_attention or dropouts else found.shared_norm
        plan |= dropouts
        attention, feed_forward = self.described.attention.name, self.described.feed_forward.name
        if norm:
            plan[""] = ParallelResidual(norm, attention, feed_forward, layout, regather=options.regather)
        inner = None if norm else layout
        for mixer in found.mixers:
            plan |= under(mixer.name, whole_styles(mixer.every, mixer.dropouts, layout))
        if found.attention:
            plan |= under(attention, self.attention(found.attention, inner))
        if found.cross_attention and self.described.cross_attention:
            plan |= under(self.described.cross_attention.name, self.attention(found.cross_attention, layout))
        for layer in found.attention_outputs:
            undivided = layer_styles(layer, Replicated(layout), Replicated(layout))
            plan |= undivided if options.replicate_attention else rowwise_styles((layer,), inner)
        if found.experts and self.described.experts:
            plan |= under(self.described.experts.name, self.experts(found.experts))
        if not found.feed_forward:
            return plan
        if not feed_forward:
            colwise = Colwise(inner, regather=options.regather, takes_rows=found.feed_forward.takes_rows)
            return plan | hidden_styles(found.feed_forward, inner, self.size, colwise)
        return plan | under(feed_forward, feed_forward_styles(found.feed_forward, inner, self.size, options.regather))

    def attention(self, found: FoundAttention, layout: Layout | None) -> Styles:
        if self.options.replicate_attention and not (self.hybrid and found.splits_over(self.size)):
            return whole_styles(found.every, found.dropouts.rates, layout_of(self.options), found.draws)
        heads = Heads(found.heads.query, found.heads.key_value)
        shared = None if heads.splits_key_value(self.size) else heads
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
                per_head_arguments=self.described.attention.per_head_arguments,
                measures_input=found.measures_input,
                same_input=self.described.attention.same_input,
                returned=found.returned,
                returned_layout=layout_of(self.options),
                regather=self.options.regather,
            )
        }
        for fused in found.fused:
            plan |= _fused_heads(fused, heads, shared, self.described.attention.adapted)
        plan |= colwise_styles(found.queries)
        for layer in found.keys_values:
            plan |= layer_styles(layer, SharedHeads(shared, None), COLWISE) if shared else colwise_styles((layer,))
        plan |= {norm.name: qk_norm(norm, found.heads.size, None) for norm in found.query_norms}
        plan |= {norm.name: qk_norm(norm, found.heads.size, shared) for norm in found.key_norms}
        plan |= {name: Replicated(partial_gradient=True) for name in found.whole}
        plan |= {norm.name: norm_of_all(norm) for norm in found.output_norms}
        plan |= rowwise_styles(found.outputs, layout)
        inputs = (*found.queries, *found.keys_values)
        return plan | inner_dropouts(found, inputs, layout, self.size)

    def experts(self, found: FoundExperts) -> Styles:
        """Every expert is split over all ranks: one gather before the router, one reduction of what all add up.

        Router and experts keep what they make of the gathered input, so that there is nothing to gather again.
        """
        described, layout = self.described.experts, layout_of(self.options)
        assert described is not None
        experts = {join(described.experts, owner): stacked for owner, stacked in found.stacked.items()}
        plan: Styles = {
            "": PrepareInputOutput(
                layout,
                layout,
                regather=False,
                reads=(*found.whole, *readable(experts, described.experts)),
                whole=found.own,
                hidden_sizes=found.hidden_sizes,
            )
        }
        plan |= {name: Replicated(partial_gradient=True) for name in found.whole}
        plan |= {name: RandomReplicated(partial_gradient=True) for name in found.sampling}
        plan |= {path: stacked_experts(stacked) for path, stacked in experts.items()}
        plan |= {name: Dropout() for name in found.dropouts.rates}  # between the experts all is whole, or a sum of it
        mlps = dict(found.shared)
        if found.expert:
            mlps[f"{described.experts}.*"] = found.expert
        for name, mlp in mlps.items():
            plan |= under(name, hidden_styles(mlp, None, self.size))
        return plan


def _fused_heads(fused: FusedLinear, heads: Heads, shared: Heads | None, adapted: AdaptedHeads | None) -> Styles:
    if fused.layout == "by_group":
        if shared:
            raise ValueError(
                f"tensor_parallel_size does not divide the {heads.key_value} groups of query heads by which the rows"
                f" of {fused.name} lie. Its divisors work; replicate_attention=True leaves the attention whole."
            )
        return {fused.name: LowRankColwise(None), fused.base: COLWISE} if fused.base else {fused.name: COLWISE}
    sharing: dict[str, Heads] = {part: shared for part in ("k", "v") if shared and part in fused.parts}
    base = FusedColwise(fused.parts, None, shared=sharing)
    if not fused.base or adapted is None:
        return {fused.name: base}
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
