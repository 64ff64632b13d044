"""From what a model looks like to its plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fabric_tp.architectures import Architecture, Attention, Block, Experts, FeedForward
from fabric_tp.architectures.architecture import children, find_feed_forwards, has
from fabric_tp.lean import Table
from fabric_tp.plan import Plan
from fabric_tp.styles import (
    AllHeadsNorm,
    Colwise,
    Dropout,
    FusedColwise,
    Heads,
    Layout,
    LMHead,
    LowRankColwise,
    LowRankFused,
    LowRankHead,
    LowRankRowwise,
    ParallelResidual,
    PrepareInput,
    PrepareInputOutput,
    RandomHeads,
    RandomUnsharded,
    Replicated,
    Rowwise,
    ScatterInput,
    ShardHeads,
    SharedHeads,
    Style,
    Unsharded,
    VocabParallelEmbedding,
)
from fabric_tp.styles.dropout import is_dropout
from fabric_tp.styles.style import mixed

BASE = "linear"
"""What an adapter calls the linear layer that it changes."""


@dataclass(frozen=True, kw_only=True)
class Options:
    tensor_parallel_size: int
    sequence_parallel: bool = True
    regather: bool = True
    loss_parallel: bool = True
    fused_loss: bool = False
    replicate_attention: bool = False

    @property
    def layout(self) -> Layout:
        """Of the activations between the sharded parts."""
        return "sequence" if self.sequence_parallel else "replicate"


def derive_plan(architecture: Architecture, model: nn.Module, options: Options) -> Plan:
    """The plan for a model of this architecture.

    Raises:
        ValueError: The model lacks modules of the architecture.
    """
    if not architecture.matches(model):
        raise ValueError(
            f"The model is a {type(model).__name__} and not {architecture.description}. fabric_tp.auto() recognises the"
            " architecture; fabric_tp.from_plan() takes a plan of yours for any other model."
        )
    if architecture.block is None:
        assert architecture.feed_forward is not None
        found = find_feed_forwards(architecture.feed_forward, model)
        plan: Plan = {name: Dropout() for name in _dropouts(model)}
        for name in found:
            parts = _feed_forward(architecture.feed_forward, model.get_submodule(name), "replicate")
            parts |= _feed_forward_dropouts(
                architecture.feed_forward, model.get_submodule(name), "replicate", options.tensor_parallel_size
            )
            plan |= {_join(name, layer): style for layer, style in parts.items()}
        return plan
    measured = architecture.measures_embedding and options.sequence_parallel
    plan = {architecture.embedding: VocabParallelEmbedding(output_layout="replicate" if measured else options.layout)}
    blocks = children(model, architecture.blocks)
    if measured:
        plan[next(iter(blocks))] = ScatterInput()
    plan |= _blocks(architecture.blocks, {name: _block(architecture.block, b, options) for name, b in blocks.items()})
    plan[architecture.norm] = Replicated(options.layout)
    loss: Any = {"loss_parallel": options.loss_parallel, "input_layout": options.layout}
    if _adapted(model, architecture.head):
        head: LMHead = LowRankHead(**loss)
    else:
        head = LMHead(**loss, fused_loss=options.fused_loss)
    head.regather = options.regather
    plan |= _layer(model, architecture.head, head, _COLWISE)
    return plan | _outer_dropouts(architecture, model, options)


def _blocks(path: str, plans: dict[str, dict[str, Style]]) -> Plan:
    """One pattern for all blocks if they are alike; otherwise each block by its name."""
    first, *others = plans.values()
    if all(repr(other) == repr(first) for other in others):
        return {_join(f"{path}.*", name): style for name, style in first.items()}
    return {_join(block, name): style for block, plan in plans.items() for name, style in plan.items()}


def _block(block: Block, module: nn.Module, options: Options) -> dict[str, Style]:
    layout = options.layout
    plan: dict[str, Style] = {name: Replicated(layout) for name in block.norms if _has_parameters(module, name)}
    norm = block.shared_norm(module) if block.shared_norm else None
    dropouts = _block_dropouts(block, module, layout)
    # A dropout between attention or MLP and the residual belongs to one of them: then they cannot share a reduction.
    shared = norm is not None and not options.replicate_attention and not dropouts
    plan |= dropouts
    if shared:
        assert norm is not None
        plan[""] = ParallelResidual(
            norm, block.attention.name, block.feed_forward.name, layout=layout, regather=options.regather
        )
    inner = None if shared else layout
    attention = module.get_submodule(block.attention.name)
    if options.replicate_attention:
        parts: dict[str, Style] = _whole_attention(block.attention, attention, layout)
    else:
        parts = _attention(block.attention, attention, inner, options)
        parts |= _attention_dropouts(block.attention, attention, inner, options.tensor_parallel_size)
    plan |= {_join(block.attention.name, name): style for name, style in parts.items()}
    experts = block.experts
    if experts and has(module, f"{experts.name}.{experts.router}"):
        moe = module.get_submodule(experts.name)
        parts = _experts(experts, block.feed_forward, moe, options)
        parts |= _experts_dropouts(experts, block.feed_forward, moe, options.tensor_parallel_size)
        return plan | {_join(experts.name, name): style for name, style in parts.items()}
    feed_forward = module.get_submodule(block.feed_forward.name)
    parts = _feed_forward(block.feed_forward, feed_forward, inner, options.regather)
    parts |= _feed_forward_dropouts(block.feed_forward, feed_forward, inner, options.tensor_parallel_size)
    return plan | {_join(block.feed_forward.name, name): style for name, style in parts.items()}


def _attention(attention: Attention, module: nn.Module, layout: Layout | None, options: Options) -> dict[str, Style]:
    size = options.tensor_parallel_size
    counts = attention.counts(module)
    heads = Heads(counts.query, counts.key_value)
    shared = None if heads.splits_key_value(size) else heads
    heads_style = RandomHeads if _is_random(attention, module) else ShardHeads
    plan: dict[str, Style] = {
        "": heads_style(
            heads,
            query_counts=_existing(module, attention.query_counts),
            key_value_counts=_existing(module, attention.key_value_counts),
            group_sizes=_existing(module, attention.group_sizes),
            input_layout=layout,
            regather=options.regather,
        )
    }
    for name in _present(module, attention.fused):
        plan |= _fused_heads(attention, module, name, heads, shared)
    plan |= _colwise(module, attention.queries)
    for name in _present(module, attention.keys_values):
        plan[name] = SharedHeads(shared, input_layout=None) if shared else _COLWISE
    plan |= {name: _head_norm(module, name, counts.size, None) for name in _present(module, attention.query_norms)}
    plan |= {name: _head_norm(module, name, counts.size, shared) for name in _present(module, attention.key_norms)}
    for name in _present(module, attention.whole):
        plan |= _whole(module, name, Replicated(partial_gradient=True))
    return plan | _rowwise(module, attention.outputs, layout)


def _fused_heads(
    attention: Attention, module: nn.Module, name: str, heads: Heads, shared: Heads | None
) -> dict[str, Style]:
    parts = attention.fused[name](module)
    sharing = {part: shared for part in ("k", "v") if shared and part in parts}
    base = FusedColwise(parts, shared=sharing, input_layout=None)
    if not _adapted(module, name):
        return {name: base}
    assert attention.adapted is not None
    layer = module.get_submodule(name)
    changed = attention.adapted.changed(layer)
    adapter = LowRankFused(
        base,
        changed,
        heads=heads,
        query_counts=attention.adapted.query_counts,
        key_value_counts=attention.adapted.key_value_counts,
        row_counts=attention.adapted.row_counts if changed else (),
        row_indices=attention.adapted.row_indices if changed else (),
    )
    return {name: adapter, _join(name, BASE): base}


def _head_norm(module: nn.Module, name: str, head_size: int, shared: Heads | None) -> Style:
    """The norm of single heads has a weight of their size, that of all heads together a longer one."""
    features = next(module.get_submodule(name).parameters()).numel()
    return Replicated(partial_gradient=True) if features == head_size else AllHeadsNorm(features, shared=shared)


def _whole(module: nn.Module, name: str, style: Style) -> dict[str, Style]:
    """A module that is whole on every rank, with all that it contains."""
    holders = [path for path, owner in module.get_submodule(name).named_modules() if _owns_parameters(owner)]
    return {_join(name, path): style for path in holders}


def _whole_attention(attention: Attention, module: nn.Module, layout: Layout) -> dict[str, Style]:
    plan: dict[str, Style] = {"": (RandomUnsharded if _is_random(attention, module) else Unsharded)(layout)}
    plan |= {name: Dropout() for name in _dropouts(module)}
    for name, _ in module.named_children():
        plan |= _whole(module, name, Replicated())
    return plan


def _feed_forward(
    feed_forward: FeedForward, module: nn.Module, layout: Layout | None, regather: bool = True
) -> dict[str, Style]:
    plan: dict[str, Style] = {"": PrepareInput(layout, regather=regather)} if layout else {}
    return plan | _hidden(feed_forward, module, layout)


def _hidden(feed_forward: FeedForward, module: nn.Module, output_layout: Layout | None) -> dict[str, Style]:
    plan = _colwise(module, feed_forward.inputs)
    for name in _present(module, feed_forward.fused):
        plan[name] = FusedColwise(feed_forward.fused[name](module), input_layout=None)
    return plan | _rowwise(module, feed_forward.outputs, output_layout)


_COLWISE = Colwise(input_layout=None)


def _colwise(module: nn.Module, names: tuple[str, ...]) -> dict[str, Style]:
    plan: dict[str, Style] = {}
    for name in _present(module, names):
        style = LowRankColwise(input_layout=None) if _adapted(module, name) else _COLWISE
        plan |= _layer(module, name, style, _COLWISE)
    return plan


def _rowwise(module: nn.Module, names: tuple[str, ...], layout: Layout | None) -> dict[str, Style]:
    plan: dict[str, Style] = {}
    for name in _present(module, names):
        style = LowRankRowwise if _adapted(module, name) else Rowwise
        plan |= _layer(module, name, style(output_layout=layout), Rowwise(output_layout=None))
    return plan


def _layer(module: nn.Module, name: str, style: Style, base: Style) -> dict[str, Style]:
    """A linear layer, or an adapter with the linear layer in it."""
    return {name: style, _join(name, BASE): base} if _adapted(module, name) else {name: style}


def _adapted(module: nn.Module, name: str) -> bool:
    return has(module, _join(name, BASE))


def _experts(experts: Experts, feed_forward: FeedForward, module: nn.Module, options: Options) -> dict[str, Style]:
    """Every expert is split over all ranks: one gather before the router, one reduction of what all experts add up.

    Router and experts keep what they make of the gathered input, so that there is nothing to gather again.
    """
    plan: dict[str, Style] = {"": PrepareInputOutput(options.layout, options.layout, regather=False)}
    plan |= _whole(module, experts.router, Replicated(partial_gradient=True))
    first = module.get_submodule(experts.experts).get_submodule("0")
    plan |= {_join(f"{experts.experts}.*", name): style for name, style in _hidden(feed_forward, first, None).items()}
    for shared in _present(module, experts.shared):
        inner = _hidden(feed_forward, module.get_submodule(shared), None)
        plan |= {_join(shared, name): style for name, style in inner.items()}
    return plan


def make_lean(model: nn.Module, table: Table) -> None:
    """Let the modules whose forward is in the table compute with the class that stands there (:mod:`fabric_tp.lean`).

    They change their class in place, nothing else, and have a dictionary in common, ``lean_shared``.
    """
    shared: dict[str, object] = {}
    for module in model.modules():
        if lean := table.get(type(module).forward):
            module.__class__ = mixed(lean, type(module))
            module.lean_shared = shared  # type: ignore[assignment]


def _outer_dropouts(architecture: Architecture, model: nn.Module, options: Options) -> Plan:
    """Outside of the blocks."""
    plan: Plan = {}
    for name in _dropouts(model):
        if name.startswith(f"{architecture.head}."):
            plan[name] = Dropout()
        elif not name.startswith(f"{architecture.blocks}."):
            if architecture.measures_embedding and options.sequence_parallel and options.tensor_parallel_size > 1:
                raise ValueError(
                    f"{name} is a Dropout between the embedding, whose output is whole on every rank, and the head,"
                    " whose input is not, and which of both it sees is not known. Use sequence_parallel=False, or move"
                    " it into the blocks."
                )
            plan[name] = Dropout(options.layout)
    return plan


def _block_dropouts(block: Block, module: nn.Module, layout: Layout) -> dict[str, Style]:
    """Outside of attention and MLP."""
    inner = {block.attention.name, block.feed_forward.name, block.experts.name if block.experts else ""}
    return {name: Dropout(layout) for name in _dropouts(module) if name.partition(".")[0] not in inner}


def _attention_dropouts(attention: Attention, module: nn.Module, layout: Layout | None, size: int) -> dict[str, Style]:
    inputs = (*attention.queries, *attention.keys_values, *attention.fused)
    return _inner_dropouts(module, inputs, attention.outputs, layout, size)


def _feed_forward_dropouts(
    feed_forward: FeedForward, module: nn.Module, layout: Layout | None, size: int
) -> dict[str, Style]:
    inputs = (*feed_forward.inputs, *feed_forward.fused)
    return _inner_dropouts(module, inputs, feed_forward.outputs, layout, size)


def _experts_dropouts(experts: Experts, feed_forward: FeedForward, module: nn.Module, size: int) -> dict[str, Style]:
    """Between the experts everything is whole on every rank, or a partial sum of all of it."""
    inside = f"{experts.experts}."
    plan: dict[str, Style] = {name: Dropout() for name in _dropouts(module) if not name.startswith(inside)}
    mlps = {f"{inside}0": f"{inside}*", **{name: name for name in experts.shared}}
    for name, pattern in mlps.items():
        if has(module, name):
            inner = _feed_forward_dropouts(feed_forward, module.get_submodule(name), None, size)
            plan |= {_join(pattern, own): style for own, style in inner.items()}
    return plan


def _inner_dropouts(
    module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...], layout: Layout | None, size: int
) -> dict[str, Style]:
    """Inside attention or an MLP: in adapters, on shards, and on what the row-wise layer made of them."""
    plan: dict[str, Style] = {}
    for name in _dropouts(module):
        parent = name.rpartition(".")[0]
        if parent and _adapted(module, parent):
            plan[name] = Dropout("features" if parent in outputs else "replicate")
            continue
        width = next(_linear(module, output).out_features for output in _present(module, outputs))
        sharded = {_linear(module, output).in_features for output in _present(module, outputs)}
        sharded |= {_linear(module, layer).out_features for layer in _present(module, inputs)}
        if size > 1 and width * size in sharded:
            raise ValueError(
                f"{name} is a Dropout in a {type(module).__name__} whose {width * size} hidden features are {width} on"
                f" each of {size} ranks, as many as its output has: which of both the dropout sees is unknown. Say so:"
                " plan = fabric_tp.auto().plan(model, tensor_parallel_size=1); plan[...] = fabric_tp.styles."
                'Dropout("features"), or where it comes last "sequence", or "replicate" without sequence parallelism;'
                " then use fabric_tp.from_plan(plan)."
            )
        plan[name] = Dropout("features", reduced_features=width, reduced_layout=layout or "replicate")
    return plan


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = module.get_submodule(_join(name, BASE) if _adapted(module, name) else name)
    assert isinstance(layer, nn.Linear)
    return layer


def _dropouts(module: nn.Module) -> list[str]:
    return [name for name, each in module.named_modules() if is_dropout(each)]


def _is_random(attention: Attention, module: nn.Module) -> bool:
    rates = (getattr(module, name, 0.0) for name in attention.dropout_rates)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def _present(module: nn.Module, names: object) -> Iterator[str]:
    return (name for name in names if has(module, name) and _has_parameters(module, name))  # type: ignore[attr-defined]


def _has_parameters(module: nn.Module, name: str) -> bool:
    """Where a model has no norm it may have an ``nn.Identity``, or one without parameters."""
    return has(module, name) and any(True for _ in module.get_submodule(name).parameters())


def _owns_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _existing(module: nn.Module, paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(path for path in paths if _has_attribute(module, path))


def _has_attribute(module: nn.Module, path: str) -> bool:
    value: object = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return isinstance(value, int)
