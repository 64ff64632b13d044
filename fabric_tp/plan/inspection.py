"""What a model of an architecture has: found once, as plain data, so that a plan can be made without the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from fabric_tp.architectures import Architecture, Attention, Block, Experts, FeedForward
from fabric_tp.architectures.linear import features
from fabric_tp.architectures.names import children, has, modules_with
from fabric_tp.plan.dropout_rates import Dropouts
from fabric_tp.plan.found import (
    FoundAttention,
    FoundBlock,
    FoundExperts,
    FoundMLP,
    FoundTransformer,
    FusedLinear,
    Linear,
    QKNorm,
)
from fabric_tp.plan.mixers import find_mixers
from fabric_tp.plan.modules import (
    all_holders,
    ask,
    attribute,
    child,
    existing,
    join,
    own,
    positive,
    present,
)
from fabric_tp.plan.stacked import by_holder
from fabric_tp.styles.dropout import is_dropout
from fabric_tp.styles.low_rank_colwise import DOWN, UP


def inspect_transformer(architecture: Architecture, model: nn.Module) -> FoundTransformer:
    """What the model has of what the architecture describes.

    Raises:
        ValueError: It lacks modules of the architecture.
    """
    _check_matches(architecture, model)
    assert architecture.block is not None
    inspector = _Inspector(architecture)
    blocks = children(model, architecture.blocks)
    before = (*architecture.positions, *architecture.before_blocks, *architecture.unused)
    return FoundTransformer(
        blocks={name: inspector.named_block(name, module) for name, module in blocks.items()},
        before=tuple(path for path in all_holders(model, before) if path != architecture.embedding),
        after=all_holders(model, (*filter(None, [architecture.norm]), *architecture.after_blocks)),
        head=inspector.linear(model, architecture.head),
        whole={name: all_holders(model, (name,)) for name in present(model, architecture.whole)},
        whole_dropouts=inspector.dropouts(model).within(*architecture.whole),
        has_head_bias=attribute(model, f"{architecture.head_bias}.bias") is not None,
        dropouts=inspector.dropouts(model).outside(architecture.blocks, *architecture.whole),
        drawn=positive(model, architecture.dropout_rates),
    )


def inspect_feed_forwards(architecture: Architecture, model: nn.Module) -> tuple[dict[str, FoundMLP], Dropouts]:
    """The MLPs anywhere in the model by their full names, and the model's dropouts.

    Raises:
        ValueError: There are none.
    """
    _check_matches(architecture, model)
    assert architecture.feed_forward is not None
    inspector = _Inspector(architecture)
    names = modules_with(model, architecture.feed_forward.inputs, architecture.feed_forward.outputs)
    found = {name: inspector.mlp(architecture.feed_forward, model.get_submodule(name)) for name in names}
    return found, inspector.dropouts(model)


class _Inspector:
    """Questions to modules; the architecture says what adapters and norms call their things."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def named_block(self, name: str, module: nn.Module) -> FoundBlock:
        assert self.architecture.block is not None
        try:
            return self.block(self.architecture.block, module)
        except ValueError as error:
            raise ValueError(
                f"{name}: {error} So it is no block of {self.architecture.description}; fabric_tp.from_plan() takes a"
                " plan of yours for any other model."
            ) from None

    def block(self, block: Block, module: nn.Module) -> FoundBlock:
        experts = block.experts
        has_experts = experts is not None and has(module, join(experts.name, experts.experts))
        cross = block.cross_attention if block.cross_attention and has(module, block.cross_attention.name) else None
        mixers = find_mixers(block, module)
        has_attention = block.has_attention(module) or not (mixers or block.one_part)
        inner = [part.name for part in (block.attention, block.feed_forward, experts, cross, *mixers) if part]
        beside = experts is not None and experts.name != block.feed_forward.name
        if has_experts:
            has_mlp = beside and has(module, block.feed_forward.name)
        else:
            has_mlp = block.has_feed_forward(module) or not block.one_part
        return FoundBlock(
            norms=all_holders(module, block.norms),
            shared_norm=block.shared_norm(module) if block.shared_norm else None,
            mixers=mixers,
            attention=self.attention(block.attention, child(module, block.attention.name)) if has_attention else None,
            attention_outputs=self.linears(module, block.attention.block_outputs),
            feed_forward=self.mlp_of_block(block.feed_forward, module) if has_mlp else None,
            experts=self.experts(experts, block.feed_forward, module) if has_experts and experts else None,
            cross_attention=self.attention(cross, child(module, cross.name)) if cross else None,
            dropouts=self.dropouts(module).outside(*inner),
            drawn=positive(module, block.dropout_rates),
            pieces=positive(module, block.piece_lengths),
        )

    def attention(self, attention: Attention, module: nn.Module) -> FoundAttention:
        heads = ask(attention.counts, module)
        width = heads.query * heads.size
        return FoundAttention(
            heads=heads,
            queries=self.linears(module, attention.queries),
            keys_values=self.linears(module, attention.keys_values),
            fused=tuple(self.fused(attention, module, name) for name in present(module, attention.fused)),
            outputs=self.linears(module, attention.outputs),
            query_norms=tuple(self.qk_norm(module, name) for name in present(module, attention.query_norms)),
            key_norms=tuple(self.qk_norm(module, name) for name in present(module, attention.key_norms)),
            output_norms=tuple(self.qk_norm(module, name) for name in present(module, attention.output_norms)),
            whole=all_holders(module, attention.whole),
            every=all_holders(module, [name for name, _ in module.named_children()]),
            query_counts=existing(module, attention.query_counts),
            key_value_counts=existing(module, attention.key_value_counts),
            group_sizes=existing(module, attention.group_sizes),
            head_features=tuple(path for path in attention.head_features if attribute(module, path) == width),
            per_query_head=own(module, attention.per_query_head),
            key_value_input=attention.key_value_input,
            returned=own(module, attention.returned),
            measures_input=bool(attention.measures_input and attention.measures_input(module)),
            draws=bool(positive(module, attention.dropout_rates)),
            dropouts=self.dropouts(module),
            output_dropouts=attention.output_dropouts,
            class_name=type(module).__name__,
        )

    def mlp(self, feed_forward: FeedForward, module: nn.Module) -> FoundMLP:
        return FoundMLP(
            inputs=self.linears(module, feed_forward.inputs),
            fused=tuple(self.fused(feed_forward, module, name) for name in present(module, feed_forward.fused)),
            outputs=self.linears(module, feed_forward.outputs),
            norms=tuple(self.qk_norm(module, name) for name in present(module, feed_forward.norms)),
            whole=all_holders(module, feed_forward.whole),
            takes_rows=feed_forward.takes_rows,
            gates=tuple(present(module, feed_forward.gates)),
            dropouts=self.dropouts(module),
            output_dropouts=feed_forward.output_dropouts,
            class_name=type(module).__name__,
        )

    def mlp_of_block(self, feed_forward: FeedForward, block: nn.Module) -> FoundMLP:
        if feed_forward.name:
            return self.mlp(feed_forward, child(block, feed_forward.name))
        return replace(self.mlp(feed_forward, block), dropouts=Dropouts())  # they are the block's

    def experts(self, experts: Experts, feed_forward: FeedForward, block: nn.Module) -> FoundExperts:
        module, each = block.get_submodule(experts.name), child(block, join(experts.name, experts.experts))
        stacked = by_holder(ask(experts.stacked, each)) if experts.stacked else {}
        return FoundExperts(
            whole=all_holders(module, (experts.router, *experts.whole)),
            sampling=tuple(path.rpartition(".")[0] for path in experts.sampling if attribute(module, path) is not None),
            own=tuple(name for name in experts.own if module._parameters.get(name) is not None),
            hidden_sizes=existing(module, experts.hidden_sizes),
            expert=None if stacked else self.mlp(feed_forward, child(each, "0")),
            stacked=stacked,
            shared={
                name: self.mlp(feed_forward, module.get_submodule(name)) for name in present(module, experts.shared)
            },
            dropouts=self.dropouts(module).outside(experts.experts, *experts.shared),
        )

    def linears(self, module: nn.Module, names: Iterable[str]) -> tuple[Linear, ...]:
        return tuple(self.linear(module, name) for name in present(module, names))

    def linear(self, module: nn.Module, name: str) -> Linear:
        base = self.base(module, name)
        layer = module.get_submodule(base or name)
        low_rank = own(module.get_submodule(name), (DOWN, UP)) if base else ()
        return Linear(name, *features(layer), base, low_rank, *self.adapters(module, name, base))

    def fused(self, owner: Attention | FeedForward, module: nn.Module, name: str) -> FusedLinear:
        described, base = owner.fused[name], self.base(module, name)
        adapted = owner.adapted if isinstance(owner, Attention) else None
        changed = adapted.changed(module.get_submodule(name)) if adapted and base else ()
        layout = described.layout if isinstance(described.layout, str) else ask(described.layout, module)
        down, up = self.adapters(module, name, base)
        return FusedLinear(name, dict(ask(described.parts, module)), layout, base, changed, down, up)

    def base(self, module: nn.Module, name: str) -> str | None:
        paths = [join(name, each) for each in self.architecture.adapter_bases]
        return next((path for path in paths if has(module, path)), None)

    def adapters(self, module: nn.Module, name: str, base: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The linear layers that go down to a low rank and up again."""
        down, up = (children(module, join(name, each)) if base else {} for each in (DOWN, UP))
        if biased := [path for path, layer in up.items() if attribute(layer, "bias") is not None]:
            raise ValueError(f"{biased[0]}, of an adapter, has a bias, which each rank would add. Leave it out.")
        return tuple(down), tuple(up)

    def qk_norm(self, module: nn.Module, name: str) -> QKNorm:
        norm = module.get_submodule(name)
        features = next(norm.parameters()).numel()
        epsilons = [getattr(norm, attribute, None) for attribute in self.architecture.norm_epsilons]
        epsilon = next((each for each in epsilons if each is not None), None)
        return QKNorm(name, features, epsilon, bool(getattr(norm, self.architecture.norm_unit_offset, False)))

    def dropouts(self, module: nn.Module) -> Dropouts:
        rates = {name: float(each.p) for name, each in module.named_modules() if is_dropout(each)}  # type: ignore[arg-type]
        return Dropouts(rates, frozenset(name for name in rates if self.is_in_adapter(module, name)))

    def is_in_adapter(self, module: nn.Module, name: str) -> bool:
        outside = name.rpartition(".")[0]
        return bool(outside) and (self.base(module, outside) is not None or self.is_in_adapter(module, outside))


def _check_matches(architecture: Architecture, model: nn.Module) -> None:
    if not architecture.matches(model):
        raise ValueError(
            f"The model is a {type(model).__name__} and not {architecture.description}. fabric_tp.auto() recognises the"
            " architecture; fabric_tp.from_plan() takes a plan of yours for any other model."
        )
