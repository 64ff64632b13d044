"""Transformers' own converters between its modules and the hub's files."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fabric_tp.architectures.hub import HubNames, Tensors

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

WHOLE_ROWS = ("Chunk", "Concatenate", "MergeModulelist", "SplitModulelist", "Force16BytesAlignment")
"""Operations that move rows, if the dimension is none of the last."""


def transformers_names(model: nn.Module) -> HubNames:
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    _check(model, conversions)
    ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    names = dict.fromkeys(model.state_dict(), True)
    to_model, to_hub = partial(_to_model, model, conversions, names), partial(_to_hub, model)
    return HubNames(to_model, to_hub, ignored, save_config=partial(_save_config, model))


def _check(model: nn.Module, conversions: list[WeightConverter | WeightRenaming]) -> None:
    for conversion in conversions:
        for operation in getattr(conversion, "operations", ()):
            if type(operation).__name__ not in WHOLE_ROWS or getattr(operation, "dim", 0) < 0:
                raise ValueError(
                    f"Transformers converts {conversion.source_patterns} of a {type(model).__name__} by {operation!r},"
                    " which is more than to put rows elsewhere. Load it with from_pretrained() before it is"
                    " parallelized."
                )


def _to_model(
    model: Any, conversions: list[WeightConverter | WeightRenaming], names: dict[str, bool], tensors: Tensors
) -> dict[str, Tensor]:
    """As ``transformers.core_model_loading.convert_and_load_state_dict_in_model``, for what is not to be loaded yet."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    found: dict[str, WeightConverter | WeightRenaming] = {}
    for name, tensor in tensors.items():
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, names)
        if renamed not in names and name in names:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, names)
        conversion = copy.deepcopy(by_pattern[pattern]) if pattern else WeightRenaming(name, renamed)
        found.setdefault(renamed, conversion).add_tensor(renamed, name, pattern or name, tensor)  # type: ignore[arg-type]
    return _converted(model, found)


def _to_hub(model: Any, tensors: Tensors) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(tensors))


def _converted(model: Any, found: dict[str, WeightConverter | WeightRenaming]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, conversion in found.items():
        for target, value in conversion.convert(name, model=model, config=model.config).items():
            result[target] = value[0] if isinstance(value, list) else value
    return result


def _save_config(model: Any, directory: Path) -> None:
    config = copy.deepcopy(model.config)
    own = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
    config.architectures, config.dtype = [own.__name__], model.dtype
    config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(directory)


def transformers_meta_model(directory: Path) -> nn.Module:
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
