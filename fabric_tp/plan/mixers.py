"""Modules that split in no way: found, refused without the permission, and computed whole on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from fabric_tp.architectures import Block
from fabric_tp.autograd.collectives import Layout
from fabric_tp.plan.modules import holders
from fabric_tp.styles import Dropout, RandomUnsharded, Replicated, Style, Unsharded
from fabric_tp.styles.dropout import is_dropout


class CannotSplit(ValueError):
    """A module splits in no way, and nobody allowed to compute it whole on every rank."""


@dataclass(frozen=True)
class FoundMixer:
    name: str
    every: tuple[str, ...]
    """All modules in it that own parameters."""
    dropouts: tuple[str, ...]
    class_name: str


def find_mixers(block: Block, module: nn.Module) -> tuple[FoundMixer, ...]:
    return tuple(_found(mixer.name, module.get_submodule(mixer.name)) for mixer in block.mixers if mixer.is_in(module))


def _found(name: str, mixer: nn.Module) -> FoundMixer:
    return FoundMixer(
        name,
        every=tuple(path for child, _ in mixer.named_children() for path in holders(mixer, child)),
        dropouts=tuple(path for path, each in mixer.named_modules() if is_dropout(each)),
        class_name=type(mixer).__name__,
    )


def refuse_mixers(found: Mapping[str, tuple[FoundMixer, ...]]) -> None:
    """Of blocks by their full names.

    Raises:
        CannotSplit: There is one.
    """
    for block, mixers in found.items():
        for mixer in mixers:
            raise CannotSplit(
                f"{block}.{mixer.name}, a {mixer.class_name}, cannot be split over ranks. replicate_attention=True"
                " computes it, and others like it, whole on every rank, and splits all else: attention, MLPs, experts,"
                " embedding and head."
            )


def whole_styles(
    every: tuple[str, ...], dropouts: Iterable[str], layout: Layout, draws: bool = False
) -> dict[str, Style]:
    """Attention or a mixer that every rank computes; its kernels may take the parameters of the layers in it."""
    plan: dict[str, Style] = {"": (RandomUnsharded if draws else Unsharded)(layout, reads=every)}
    plan |= {name: Dropout() for name in dropouts}
    return plan | {name: Replicated() for name in every}
