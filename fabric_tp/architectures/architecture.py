from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Attention:
    """The attention module of a block. Names are paths from it; those a model lacks are skipped."""

    name: str
    heads: tuple[str, ...]
    """Attributes that count heads, of queries and of keys and values: ``"n_heads"`` or ``"config.n_head"``."""
    outputs: tuple[str, ...]
    """Linear layers from the heads back to the model's width."""
    inputs: tuple[str, ...] = ()
    """Linear layers from the model's width to the heads."""
    fused: Mapping[str, Callable[[nn.Module], Mapping[str, int]]] | None = None
    """Linear layers to several things at once, with a function from the attention module to the rows of each part."""


@dataclass(frozen=True)
class FeedForward:
    """The MLP of a block. Names are paths from it; those a model lacks are skipped."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    norms: tuple[str, ...]
    attention: Attention
    feed_forward: FeedForward


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
    norm: str = ""
    head: str = ""
    feed_forward: FeedForward | None = None

    @property
    def ends(self) -> tuple[tuple[str, ...], ...]:
        """What comes before the blocks, and what after them."""
        return ((self.embedding,), (self.norm, self.head)) if self.block else ()

    def matches(self, model: nn.Module) -> bool:
        """Whether the model has the modules of this architecture."""
        if self.block is None:
            assert self.feed_forward is not None
            return bool(find_feed_forwards(self.feed_forward, model))
        blocks = list(children(model, self.blocks).values())
        attention = self.block.attention
        projections = (*attention.inputs, *(attention.fused or {}), *attention.outputs)
        return (
            all(has(model, path) for path in (self.embedding, self.norm, self.head))
            and bool(blocks)
            and has(blocks[0], attention.name)
            and sum(has(blocks[0], f"{attention.name}.{name}") for name in projections) >= 2
        )


def has(module: nn.Module, path: str) -> bool:
    """Whether there is a submodule at ``path``; litgpt's blocks hold ``None`` for a norm that they share."""
    try:
        return isinstance(module.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def children(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """The blocks by their full names."""
    if not has(model, path):
        return {}
    return {f"{path}.{name}" if path else name: child for name, child in model.get_submodule(path).named_children()}


def find_feed_forwards(feed_forward: FeedForward, model: nn.Module) -> list[str]:
    """Full names of all modules that have the layers of ``feed_forward``."""
    needed = (*feed_forward.inputs, *feed_forward.outputs)
    return [name for name, module in model.named_modules() if all(has(module, layer) for layer in needed)]
