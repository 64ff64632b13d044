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

from fabric_tp.architectures.names import by_class

NAMES = {
    "litgpt.model.GPT": "fabric_tp.architectures.litgpt.hub:litgpt_names",
    "transformers.modeling_utils.PreTrainedModel": "fabric_tp.architectures.huggingface.hub:transformers_names",
}
"""By the class, or one that it inherits from, what gives the :class:`HubNames` of a model."""

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
    """Writes the config into a directory that may have another's; None where another's is needed."""

    def is_ignored(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.ignored)


def hub_names(model: nn.Module) -> HubNames:
    """The converters for a model, parallelized or not; a model of neither library has the names that it has."""
    names = by_class(NAMES, model)
    return names(model) if names else HubNames(dict, dict)


def meta_model(directory: Path, model_name: str | None, *, of_litgpt: bool) -> nn.Module:
    """The model without memory of a directory with a config: litgpt's, if it has one for it, or Transformers'.

    Args:
        directory: With ``model_config.yaml`` or ``config.json``, or whose name is that of one of litgpt's configs.
        model_name: The name of litgpt's config.
        of_litgpt: Only litgpt's model will do.

    Raises:
        ValueError: There is no config.
    """
    if model_name or of_litgpt or (directory / "model_config.yaml").is_file():
        from fabric_tp.architectures.litgpt.config import load_config
        from fabric_tp.architectures.litgpt.config import meta_model as litgpt_model

        return litgpt_model(load_config(model_name or directory))
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"{str(directory)!r} has neither model_config.yaml nor config.json, so that its model is not known. Give a"
            " directory that has one as `like`, or a name that litgpt knows as `model_name`."
        )
    from fabric_tp.architectures.huggingface.hub import transformers_meta_model

    return transformers_meta_model(directory)


def save_as_litgpt(model: nn.Module, directory: Path, fetch: Callable[[str], Tensor]) -> None:
    """litgpt's files of one of its models, whose tensors are fetched one after the other."""
    from fabric_tp.architectures.litgpt.hub import save_lit_model

    save_lit_model(model, directory, fetch)


def grouped(names: Iterable[str]) -> list[list[str]]:
    """Those of each block together, in its order; what belongs to none comes first. Experts are in their order."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=_natural):
        number = re.search(r"\.\d+\.", name)
        groups.setdefault(name[: number.end()] if number else "", []).append(name)
    return [groups.pop("", []), *groups.values()] if "" in groups else list(groups.values())


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
