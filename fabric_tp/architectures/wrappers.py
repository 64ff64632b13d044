"""Models that hold another one, add to it, and give it all their arguments."""

from __future__ import annotations

from dataclasses import replace

from fabric_tp.architectures.architecture import Architecture

WRAPPERS = ("base_model.model",)
"""Paths to the other one: of PEFT's models with adapters."""


def within(architecture: Architecture, wrapper: str) -> Architecture:
    """The architecture of a model that holds one of this kind at the path ``wrapper`` and gives it all arguments."""

    def inside(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{wrapper}.{path}" if path else "" for path in paths)

    embedding, blocks, norm, head, bias = inside(
        (architecture.embedding, architecture.blocks, architecture.norm, architecture.head, architecture.head_bias)
    )
    return replace(
        architecture,
        embedding=embedding,
        blocks=blocks,
        positions=inside(architecture.positions),
        before_blocks=inside(architecture.before_blocks),
        after_blocks=inside(architecture.after_blocks),
        whole=inside(architecture.whole),
        unused=inside(architecture.unused),
        dropout_rates=inside(architecture.dropout_rates),
        norm=norm,
        head=head,
        head_bias=bias,
        tested=(),
        classes=(),
    )
