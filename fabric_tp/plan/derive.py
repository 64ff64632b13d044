"""From what a model has to its plan: functions of plain data, none of which sees the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fabric_tp.architectures import Architecture, Block
from fabric_tp.autograd.collectives import Layout
from fabric_tp.plan.attention import attention_styles, uncut_heads
from fabric_tp.plan.dropouts import check_drawn, outer_dropouts
from fabric_tp.plan.found import (
    FoundAttention,
    FoundBlock,
    FoundExperts,
    FoundTransformer,
    Linear,
)
from fabric_tp.plan.inspection import inspect_feed_forwards, inspect_transformer
from fabric_tp.plan.layers import (
    COLWISE,
    Styles,
    feed_forward_styles,
    hidden_styles,
    replicated_styles,
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
    GatherOutput,
    HeadBias,
    LMHead,
    LowRankHead,
    ParallelResidual,
    PrepareInputOutput,
    RandomReplicated,
    Replicated,
    ScatterInput,
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
    plan |= _head(found.head, before_head, options)
    for name, inner in found.whole.items():  # all ranks see the same and compute the same, random numbers included
        reads = tuple(path.removeprefix(f"{name}.") for path in inner if path != name)
        plan |= {**dict.fromkeys(inner, Replicated()), name: RandomReplicated(reads=reads)}
    plan |= dict.fromkeys(found.whole_dropouts.rates, Dropout())
    return plan | outer_dropouts(architecture, found.dropouts, layout, measured and tensor_parallel_size > 1)


def _head(head: Linear, layout: Layout | None, options: TransformerOptions) -> Plan:
    """An adapter that changes nothing leaves all to the layer within it."""
    if head.down:
        raise ValueError(f"{head.name}, the head, has an adapter of which no style splits the parts. Leave it out.")
    loss_parallel, regather = options.loss_parallel, options.regather
    if head.base and head.low_rank:
        return {head.name: LowRankHead(layout, loss_parallel=loss_parallel, regather=regather), head.base: COLWISE}
    style = LMHead(layout, regather=regather, loss_parallel=loss_parallel, fused_loss=options.fused_loss)
    return {head.base or head.name: style}


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
            if options.replicate_attention or not found.attention:
                plan |= replicated_styles(layer, layout)
            else:
                plan |= rowwise_styles((layer,), inner, uncut=uncut_heads(found.attention, self.size))
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
        return attention_styles(found, self.described.attention, self.options, layout, self.size)

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
