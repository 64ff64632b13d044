"""What a model's tensors are called in a directory from the hub, and which of them are cut or put together there.

This is known to the libraries that the models come from, each of which has converters of its own: they run here, on
whatever stands in the tensors' place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class HubNames:
    """Converts a group of tensors that belong together, such as those of a block."""

    to_model: Callable[[Tensors], dict[str, Tensor]]
    """From the hub's tensors to the model's."""
    to_hub: Callable[[Tensors], dict[str, Tensor]]
    """From the model's tensors to the hub's."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors in the hub's files that the model has no place for."""
    tied: tuple[str, str] | None = None
    """Two of the model's tensors, of which the hub has the second only where they are equal; its config says so."""
    save_config: Callable[[Path], None] | None = None
    """Writes what else a directory needs; None where another directory must give it."""

    def is_ignored(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.ignored)


def hub_names(model: nn.Module) -> HubNames:
    """The converters for a model, parallelized or not; a model of neither library has the names that it has."""
    import litgpt

    config = getattr(model, "config", None)
    if isinstance(config, litgpt.Config):
        from fabric_tp.architectures.litgpt.hub import litgpt_names

        return litgpt_names(config)
    if hasattr(model, "base_model_prefix") and hasattr(config, "model_type"):
        from fabric_tp.architectures.huggingface.hub import transformers_names

        return transformers_names(model)
    return HubNames(dict, dict)


def grouped(names: Iterable[str]) -> list[list[str]]:
    """Those of each block together, in its order; what belongs to none comes first. Experts are in their order."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=_natural):
        number = re.search(r"\.\d+\.", name)
        groups.setdefault(name[: number.end()] if number else "", []).append(name)
    return [groups.pop("", []), *groups.values()] if "" in groups else list(groups.values())


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
