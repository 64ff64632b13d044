"""The styles of linear layers and of the MLPs that are made of them, by names within the module that has them."""

from __future__ import annotations

from fabric_tp.autograd.collectives import Layout
from fabric_tp.plan.dropouts import inner_dropouts
from fabric_tp.plan.found import FoundMLP, FusedLinear, Linear, QKNorm
from fabric_tp.plan.modules import join
from fabric_tp.styles import (
    AllHeadsNorm,
    Colwise,
    FusedColwise,
    Heads,
    LowRankColwise,
    LowRankRowwise,
    PrepareInput,
    Replicated,
    Rowwise,
    Style,
    Unsharded,
)

Styles = dict[str, Style]
"""By path from the module that is meant."""

COLWISE = Colwise(None)


def under(path: str, styles: Styles) -> Styles:
    return {join(path, name): style for name, style in styles.items()}


def norm_of_all(norm: QKNorm, shared: Heads | None = None, uncut: Heads | None = None) -> AllHeadsNorm:
    return AllHeadsNorm(norm.features, shared=shared, heads=uncut, epsilon=norm.epsilon, unit_offset=norm.unit_offset)


def qk_norm(norm: QKNorm, head_size: int, shared: Heads | None, uncut: Heads | None = None) -> Style:
    """The norm of single heads has a weight of their size, that of all heads together a longer one."""
    if norm.features == head_size:
        return Replicated(partial_gradient=True)
    return norm_of_all(norm, shared, None if shared else uncut)


def feed_forward_styles(found: FoundMLP, layout: Layout | None, size: int, regather: bool = True) -> Styles:
    if found.gates and layout:
        return _gated(found, layout, size)
    plan: Styles = {"": PrepareInput(layout, regather=regather)} if layout else {}
    return plan | hidden_styles(found, layout, size)


def _gated(found: FoundMLP, layout: Layout, size: int) -> Styles:
    """All but the hidden features is whole on every rank: what is multiplied must not be a partial sum."""
    plan: Styles = {"": Unsharded(layout, reads=found.gates), **{name: Replicated() for name in found.gates}}
    return plan | hidden_styles(found, "replicate", size, Colwise("replicate"))


def hidden_styles(found: FoundMLP, output_layout: Layout | None, size: int, colwise: Colwise = COLWISE) -> Styles:
    plan = colwise_styles(found.inputs, colwise)
    for fused in found.fused:
        style = FusedColwise(fused.parts, None)
        plan |= adapted_colwise(fused, style) if fused.base else {fused.name: style}
    plan |= {norm.name: norm_of_all(norm) for norm in found.norms}
    plan |= rowwise_styles(found.outputs, output_layout, found.takes_rows)
    plan |= {name: Replicated(partial_gradient=True) for name in found.whole}
    return plan | inner_dropouts(found, found.inputs, output_layout, size)


def colwise_styles(layers: tuple[Linear, ...], colwise: Colwise = COLWISE) -> Styles:
    plan: Styles = {}
    for layer in layers:
        if layer.base:
            plan |= adapted_colwise(layer, Colwise(None, heads=colwise.heads), colwise.input_layout)
        else:
            plan[layer.name] = colwise
    return plan


def rowwise_styles(
    layers: tuple[Linear, ...], layout: Layout | None, takes_rows: bool = False, uncut: Heads | None = None
) -> Styles:
    plan: Styles = {}
    for layer in layers:
        if layer.base:
            inner = Rowwise(None, heads=uncut)
            plan |= {layer.name: LowRankRowwise(layout, heads=uncut), layer.base: inner}
            plan |= dict.fromkeys(layer.down, inner) | dict.fromkeys(layer.up, Replicated(partial_gradient=True))
        else:
            plan[layer.name] = Rowwise(layout, takes_rows=takes_rows, heads=uncut)
    return plan


def adapted_colwise(layer: Linear | FusedLinear, base: Colwise, layout: Layout | None = None) -> Styles:
    """An adapter around a column-wise layer: what it makes is split as the layer's own output is."""
    assert layer.base is not None
    plan: Styles = {layer.name: LowRankColwise(layout, heads=base.uncut), layer.base: base}
    return plan | dict.fromkeys(layer.down, Replicated(partial_gradient=True)) | dict.fromkeys(layer.up, base)


def replicated_styles(layer: Linear, layout: Layout) -> Styles:
    """A linear layer, or an adapter with all that is in it."""
    names = [layer.name, *([layer.base] if layer.base else []), *layer.down, *layer.up]
    return dict.fromkeys(names, Replicated(layout))
