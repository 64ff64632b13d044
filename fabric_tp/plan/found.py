"""What was found in a model of an architecture, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from fabric_tp.architectures import HeadCounts
from fabric_tp.architectures.architecture import FusedLayout, Stacked
from fabric_tp.plan.dropout_rates import Dropouts
from fabric_tp.plan.mixers import FoundMixer


@dataclass(frozen=True)
class Linear:
    """A linear layer, or an adapter around one."""

    name: str
    in_features: int
    out_features: int
    base: str | None
    """The layer within the adapter, if it is one."""
    low_rank: tuple[str, ...] = ()
    """The parameters of the adapter itself: one that changes nothing has none."""
    down: tuple[str, ...] = ()
    up: tuple[str, ...] = ()
    """The adapter's own two matrices, where they are linear layers in it, one of each for every adapter."""


@dataclass(frozen=True)
class FusedLinear:
    name: str
    parts: dict[str, int]
    layout: FusedLayout
    base: str | None
    changed: tuple[str, ...] = ()
    """Of an adapter: the parts that it changes."""
    down: tuple[str, ...] = ()
    up: tuple[str, ...] = ()
    """As in :class:`Linear`."""


@dataclass(frozen=True)
class QKNorm:
    name: str
    features: int
    epsilon: float | None
    """None: it is no norm that could be computed over several ranks."""
    unit_offset: bool


@dataclass(frozen=True)
class FoundMLP:
    inputs: tuple[Linear, ...]
    fused: tuple[FusedLinear, ...]
    outputs: tuple[Linear, ...]
    norms: tuple[QKNorm, ...]
    """Of all hidden features."""
    whole: tuple[str, ...]
    """Modules with parameters that all hidden features share."""
    takes_rows: bool
    gates: tuple[str, ...]
    dropouts: Dropouts
    output_dropouts: tuple[str, ...]
    class_name: str


@dataclass(frozen=True)
class FoundAttention:
    heads: HeadCounts
    queries: tuple[Linear, ...]
    keys_values: tuple[Linear, ...]
    fused: tuple[FusedLinear, ...]
    outputs: tuple[Linear, ...]
    query_norms: tuple[QKNorm, ...]
    key_norms: tuple[QKNorm, ...]
    output_norms: tuple[QKNorm, ...]
    whole: tuple[str, ...]
    """Modules with parameters of which each rank needs all."""
    every: tuple[str, ...]
    """All modules with parameters."""
    query_counts: tuple[str, ...]
    key_value_counts: tuple[str, ...]
    group_sizes: tuple[str, ...]
    head_features: tuple[str, ...]
    per_query_head: tuple[str, ...]
    key_value_input: str
    returned: tuple[str, ...]
    measures_input: bool
    draws: bool
    """Its kernel has dropout inside."""
    dropouts: Dropouts
    output_dropouts: tuple[str, ...]
    class_name: str

    def splits_over(self, size: int) -> bool:
        by_group = any(fused.layout == "by_group" for fused in self.fused)
        return not by_group or self.heads.key_value % size == 0 or self.heads.key_value == self.heads.query


@dataclass(frozen=True)
class FoundExperts:
    whole: tuple[str, ...]
    """Modules with parameters in the router, and others that see every token."""
    sampling: tuple[str, ...]
    """Those of them that draw random numbers."""
    own: tuple[str, ...]
    hidden_sizes: tuple[str, ...]
    expert: FoundMLP | None
    """None where the experts' parameters are stacked."""
    stacked: dict[str, dict[str, Stacked]]
    """By the module, within that of the experts, which holds them."""
    shared: dict[str, FoundMLP]
    dropouts: Dropouts
    """Between the experts."""


@dataclass(frozen=True)
class FoundBlock:
    norms: tuple[str, ...]
    shared_norm: str | None
    mixers: tuple[FoundMixer, ...]
    attention: FoundAttention | None
    attention_outputs: tuple[Linear, ...]
    """Those outside of the attention module."""
    feed_forward: FoundMLP | None
    experts: FoundExperts | None
    cross_attention: FoundAttention | None
    dropouts: Dropouts
    """Outside of attention and MLP."""
    drawn: dict[str, float]
    """Positive rates of dropout in its own forward, by the attributes that hold them."""
    pieces: dict[str, float]
    """Lengths of the pieces into which it cuts the sequence, likewise."""


@dataclass(frozen=True)
class FoundTransformer:
    blocks: dict[str, FoundBlock]
    """By their full names, in their order."""
    before: tuple[str, ...]
    after: tuple[str, ...]
    """Modules with parameters before the blocks, around the embedding or after it; and between blocks and head."""
    head: Linear
    has_head_bias: bool
    whole: dict[str, tuple[str, ...]]
    """What joins the embedding's output: the modules with parameters in each."""
    whole_dropouts: Dropouts
    dropouts: Dropouts
    """Outside of all these and of the blocks."""
    drawn: dict[str, float]
    """As in :class:`FoundBlock`."""
