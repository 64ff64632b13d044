"""What there is to say about a family of models; see the README beside this file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from fabric_tp.architectures.heads import AdaptedHeads, HeadCounts
from fabric_tp.architectures.names import children, class_path, has, modules_with

Parts = Callable[[nn.Module], Mapping[str, int]]
"""From a module to the output features of each part of a fused linear layer in it, in their order."""


FusedLayout = Literal["consecutive", "by_group"]
"""How the output features of the parts of a fused layer lie.

``"consecutive"``: all of the first part, then all of the second (``[Q; K; V]``, ``[gate; up]``). ``"by_group"``: for
each group of query heads that share a key and a value head, its queries, its key, its value; where there are as many
key and value heads as query heads, a group is one head (GPT-NeoX, Falcon).
"""


@dataclass(frozen=True)
class Fused:
    """A linear layer that does the work of several."""

    parts: Parts
    layout: FusedLayout | Callable[[nn.Module], FusedLayout]
    """No check can tell the layouts apart, since all have the same sizes; hence no default. A function, from the module
    that owns the layer, where it depends on an option."""


@dataclass(frozen=True)
class Attention:
    """The attention module of a block. Names are paths from it; those that a model lacks are skipped."""

    name: str
    counts: Callable[[nn.Module], HeadCounts]
    """How many heads the attention module has."""
    outputs: tuple[str, ...] = ()
    """Linear layers from the heads back to the model's width."""
    block_outputs: tuple[str, ...] = ()
    """The same, outside of the attention module: paths from the block."""
    queries: tuple[str, ...] = ()
    """Linear layers whose output features are those of the query heads."""
    keys_values: tuple[str, ...] = ()
    """Linear layers whose output features are those of the key and value heads."""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    """Linear layers to the heads of "q", "k" and "v"."""
    adapted: AdaptedHeads | None = None
    """What a low-rank adapter around a fused layer looks like."""
    query_norms: tuple[str, ...] = ()
    key_norms: tuple[str, ...] = ()
    """Norms of each head, or of all heads together; their weights tell which."""
    output_norms: tuple[str, ...] = ()
    """Norms of what all heads together give, before the layers of ``outputs``."""
    whole: tuple[str, ...] = ()
    """Layers before the split into heads, such as the compressions of multi-head latent attention."""
    query_counts: tuple[str, ...] = ()
    """Attributes that hold the number of query heads: ``"n_heads"``, ``"config.n_head"``."""
    key_value_counts: tuple[str, ...] = ()
    """Attributes that hold the number of key and value heads."""
    group_sizes: tuple[str, ...] = ()
    """Attributes that hold the number of query heads to each key and value head."""
    head_features: tuple[str, ...] = ()
    """Attributes that hold the number of features of all query heads together, with which the forward reshapes
    attention's result (``"hidden_size"``); where the model's width is another number, they mean that and stay."""
    per_query_head: tuple[str, ...] = ()
    """Its own parameters that have a number for each query head, such as attention sinks."""
    per_head_arguments: tuple[str, ...] = ()
    """Arguments of its forward with numbers for each query head, such as ALiBi's biases: what is added to the scores,
    (..., heads, queries, keys), where the heads may be those of one sample after the other."""
    measures_input: Callable[[nn.Module], bool] | None = None
    """Whether its forward takes the number of features of all heads from the width of its input, which it may use for
    nothing else but the linear layers."""
    same_input: tuple[str, ...] = ()
    """Arguments of its forward that are given the same activations as the first, such as keys and values."""
    returned: tuple[str, ...] = ()
    """Its own parameters that it does not compute with but returns, for the block to add to the residual stream."""
    dropout_rates: tuple[str, ...] = ()
    """Attributes that hold the rate of dropout inside the attention's kernel."""
    key_value_input: str = ""
    """Argument of its forward with what keys and values are made of, where that is not the block's own input."""
    output_dropouts: tuple[str, ...] = ()
    """Dropouts of what ``outputs`` made; of others the sizes tell what they see, if they can."""


@dataclass(frozen=True)
class FeedForward:
    """An MLP. Names are paths from it; those that a model lacks are skipped."""

    name: str
    """Empty where its layers are the block's own."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fused: Mapping[str, Fused] = field(default_factory=dict)
    """Linear layers to several things of the hidden width."""
    norms: tuple[str, ...] = ()
    """Norms of all hidden features together, before the layers of ``outputs``."""
    whole: tuple[str, ...] = ()
    """Modules whose parameters all hidden features share, such as an activation with a learned slope."""
    takes_rows: bool = False
    """Of a block's own layers: the block may give them tokens in a row, ``(b * s, h)``."""
    gates: tuple[str, ...] = ()
    """Layers of the model's width, made from the input like the hidden features, that the output is multiplied by."""
    output_dropouts: tuple[str, ...] = ()
    """As in :class:`Attention`."""


@dataclass(frozen=True)
class Stacked:
    """A parameter that all experts have together."""

    dim: int | None
    """Of its hidden features; None where it is added to the output."""
    parts: tuple[str, ...] = ()
    """Parts of equal size that lie one after the other along that dimension, such as gate and up."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP."""

    name: str
    router: str
    """The module that chooses; it sees every token on every rank."""
    experts: str
    """The ModuleList of experts, MLPs with the layers of ``FeedForward``; or a module with their parameters, which is
    the whole one if this is empty."""
    stacked: Callable[[nn.Module], Mapping[str, Stacked]] | None = None
    """From such a module to what its parameters are, its own and, by their paths, those of modules in it."""
    hidden_sizes: tuple[str, ...] = ()
    """Attributes that hold the number of hidden features, with which a forward reshapes: ``"experts.hidden_size"``."""
    shared: tuple[str, ...] = ()
    """MLPs that every token passes."""
    whole: tuple[str, ...] = ()
    """Further modules that see every token on every rank: other names of the router, the gate of a shared expert."""
    own: tuple[str, ...] = ()
    """Its own parameters that see every token, such as what is added to the router's scores."""
    sampling: tuple[str, ...] = ()
    """Attributes of routers that draw random numbers in training, and that no other router has:
    ``"router.router_jitter_noise"``."""


@dataclass(frozen=True)
class Mixer:
    """A module that mixes tokens in place of attention, or beside it, and splits in no way: a convolution, a state
    space, linear attention. Every rank computes it whole, with ``replicate_attention=True``."""

    name: str
    layers: tuple[str, ...] = ()
    """Modules in it, all of which tell it from attention or an MLP that has the same name in another block."""

    def is_in(self, block: nn.Module) -> bool:
        return has(block, self.name) and all(has(block, f"{self.name}.{layer}") for layer in self.layers)


@dataclass(frozen=True)
class Block:
    norms: tuple[str, ...]
    """Norms, and modules of any other kind that treat each token by itself and are whole on every rank."""
    attention: Attention
    feed_forward: FeedForward
    experts: Experts | None = None
    """In place of the MLP; or beside it, where they have another name."""
    cross_attention: Attention | None = None
    """A second attention, to the output of an encoder, that some models have; its forward need not be called."""
    mixers: tuple[Mixer, ...] = ()
    """A block may have these and no attention."""
    one_part: bool = False
    """Each block is one of mixer, attention, MLP and experts, which may all have the same name."""
    dropout_rates: tuple[str, ...] = ()
    """Attributes that hold a rate of dropout in the block's own forward, without a module; it must be 0."""
    piece_lengths: tuple[str, ...] = ()
    """Attributes that, if not 0, make the block cut the sequence into pieces of so many tokens."""
    shared_norm: Callable[[nn.Module], str | None] | None = None
    """From a block to the norm whose output both attention and MLP take, and both add to the block's input."""

    def has_attention(self, block: nn.Module) -> bool:
        return _has_layers(block, self.attention) and not any(
            mixer.name == self.attention.name and mixer.is_in(block) for mixer in self.mixers
        )

    def has_feed_forward(self, block: nn.Module) -> bool:
        return _has_layers(block, self.feed_forward)

    def describes(self, block: nn.Module) -> bool:
        """Whether the block's parts have the names that are described; its layers are not all looked for."""
        mixes = self.has_attention(block) or any(mixer.is_in(block) for mixer in self.mixers)
        names = [self.feed_forward.name, *([self.experts.name] if self.experts else [])]
        feeds = any(not name or has(block, name) for name in names)
        return (mixes or feeds) if self.one_part else (mixes and feeds)


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a transformer are, and what they are called.

    Either a whole transformer (``embedding``, ``blocks``, ``block``, ``norm``, ``head``), or, without ``block``, any
    module that contains the layers of ``feed_forward``.
    """

    name: str
    description: str
    embedding: str = ""
    blocks: str = ""
    """The ModuleList or ModuleDict of blocks."""
    block: Block | None = None
    positions: tuple[str, ...] = ()
    """Learned embeddings of positions, added to the embedding's output; they need ``measures_embedding``."""
    before_blocks: tuple[str, ...] = ()
    """Further modules between the embedding and the blocks, such as a norm or a dropout, or around the embedding; every
    rank computes all that is in them on the whole sequence. They need ``measures_embedding``."""
    after_blocks: tuple[str, ...] = ()
    """Further modules between the blocks and the head, such as a projection, or a norm that not all models have; they
    treat each token by itself."""
    whole: tuple[str, ...] = ()
    """Modules whose output joins the embedding's, such as a vision tower; they need ``measures_embedding``."""
    unused: tuple[str, ...] = ()
    """Modules on whose output nothing depends that the model returns; every rank has them whole."""
    dropout_rates: tuple[str, ...] = ()
    """Paths to attributes that hold a rate of dropout in the model's own forward; it must be 0."""
    norm: str = ""
    """Between the blocks and the head; empty where there may be none."""
    head: str = ""
    head_bias: str = ""
    """A module that has the head's bias too, under the name ``bias``."""
    feed_forward: FeedForward | None = None
    lean: str = ""
    """Where the table of the family's own lean modules is, as ``"package.module:NAME"``; torch's norms need none."""
    adapter_bases: tuple[str, ...] = ("linear", "base_layer")
    """What low-rank adapters may call the linear layer that they change."""
    norm_epsilons: tuple[str, ...] = ("eps", "variance_epsilon")
    """Attributes that may hold what a norm of queries or keys adds to the mean square."""
    norm_unit_offset: str = "add_unit_offset"
    """Attribute of such a norm that, if true, makes it multiply with ``1 + weight``."""
    balances_experts: tuple[str, ...] = ()
    """Arguments of the forward, and options in the model's ``config``, that add a loss of the routers' outputs."""
    splits_sequence: tuple[str, ...] = ()
    """Arguments of the forward that make it cut the sequence into pieces, of which each rank has only a part."""
    tested: tuple[str, ...] = ()
    """Classes, by module and name, of which tests cover every variant. Others are verified: ``Parallelize.verify``."""
    classes: tuple[str, ...] = ()
    """The only classes, by module and name, that this describes; empty: every one that has these modules."""
    computes_samples_apart: tuple[str, ...] = ()
    """Classes, by module and name, whose whole forward treats each sample by itself, and returns nothing but what it
    makes of each."""
    measures_embedding: bool = False
    """The model takes the sequence length from the embedding's output, which must then be whole on every rank."""
    measures_output: bool = False
    """The model reshapes or cuts the last norm's output by the sequence length: it must be whole on every rank too."""

    @property
    def ends(self) -> tuple[tuple[str, ...], ...]:
        """What comes before the blocks, and what after them."""
        return ((self.embedding,), tuple(filter(None, (self.norm, self.head)))) if self.block else ()

    def matches(self, model: nn.Module) -> bool:
        """Whether the model has the modules of this architecture."""
        if self.classes and class_path(model) not in self.classes:
            return False
        if self.block is None:
            assert self.feed_forward is not None
            return bool(modules_with(model, self.feed_forward.inputs, self.feed_forward.outputs))
        first = next(iter(children(model, self.blocks).values()), None)
        return (
            all(has(model, path) for path in (self.embedding, self.norm, self.head) if path)
            and first is not None
            and self.block.describes(first)
        )


def _has_layers(block: nn.Module, part: Attention | FeedForward) -> bool:
    """Whether the part is in the block, with one of its layers at either end."""
    inputs = (*(part.queries if isinstance(part, Attention) else part.inputs), *part.fused)
    ends = [[f"{part.name}.{name}" if part.name else name for name in names] for names in (inputs, part.outputs)]
    ends[1] += part.block_outputs if isinstance(part, Attention) else ()
    return all(any(has(block, path) for path in paths) for paths in ends)
