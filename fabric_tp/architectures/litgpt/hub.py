"""litgpt's own converters between its ``lit_model.pth`` and the hub's files."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from litgpt import Config
from litgpt.scripts import convert_hf_checkpoint as from_hub
from litgpt.scripts import convert_lit_checkpoint as to_hub
from litgpt.utils import incremental_save, save_config
from torch import Tensor, nn

from fabric_tp.architectures.hub import HubNames, Tensors
from fabric_tp.architectures.litgpt.llama_config import is_llama, save_llama_config

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


def litgpt_names(model: nn.Module) -> HubNames:
    config: Any = model.config
    is_known = _family(config) == "llama" and is_llama(config)
    save = partial(save_llama_config, config) if is_known else None
    return HubNames(partial(_to_model, config), partial(_to_hub, config), tied=(HEAD, EMBEDDING), save_config=save)


def _family(config: Config) -> str:
    """Which of litgpt's converters is for a config, by the same marks as in its own commands."""
    name = config.name.lower()
    if "falcon" in name:
        return "falcon"
    for start, family in (
        *(
            ("gemma-2-", "gemma_2"),
            ("gemma-3", "gemma_3"),
            ("phi", "phi"),
            ("qwen2.5", "qwen_2_5"),
            ("qwq", "qwen_2_5"),
        ),
        *(("olmo-2-", "olmo2"), ("qwen3", "qwen_3")),
    ):
        if name.startswith(start):
            return family
    return "llama" if config.mlp_class_name in ("LLaMAMLP", "GemmaMLP", "LLaMAMoE") else "gpt_neox"


def _to_model(config: Config, tensors: Tensors) -> dict[str, Tensor]:
    family = _family(config)
    fused: dict[Any, Any] = {}
    converters: dict[str, Callable[..., None]] = {
        "falcon": partial(from_hub.copy_weights_falcon, config),
        "gemma_2": partial(from_hub.copy_weights_gemma_2, fused),
        "gemma_3": partial(from_hub.copy_weights_gemma_3, fused, config=config),
        "phi": partial(from_hub.copy_weights_phi, config, fused),
        "qwen_2_5": partial(from_hub.copy_weights_qwen_2_5, config, fused),
        "olmo2": partial(from_hub.copy_weights_olmo2, config, fused),
        "qwen_3": partial(from_hub.copy_weights_qwen_3, config, fused),
        "llama": partial(from_hub.copy_weights_hf_llama, config, fused),
        "gpt_neox": partial(from_hub.copy_weights_gpt_neox, config),
    }
    state: dict[str, Any] = defaultdict(lambda: None)  # where this group has no embedding, the head is not tied to it
    _convert(config, converters[family], state, tensors)
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def _to_hub(config: Config, tensors: Tensors) -> dict[str, Tensor]:
    converter = partial(getattr(to_hub, f"copy_weights_{_family(config)}"), config)
    if "untie_weights" in inspect.signature(converter).parameters:
        converter = partial(converter, untie_weights=False)  # whether the head is there has been decided
    if _family(config) == "olmo2":  # whose table to the hub, as of litgpt 0.5.12, has a name that the model has not
        tensors = {name.replace(".post_attention_norm.", ".norm_2."): tensor for name, tensor in tensors.items()}
    state: dict[str, Any] = {}
    _convert(config, converter, state, tensors)
    return state


def _convert(config: Config, converter: Callable[..., None], state: dict[str, Any], tensors: Tensors) -> None:
    try:
        converter(state, dict(tensors))
    except KeyError as error:
        raise ValueError(
            f"{error} is no tensor of {config.name}, as litgpt's converter knows it. Is it of that model?"
        ) from None


def save_lit_model(model: nn.Module, directory: Path, fetch: Callable[[str], Tensor]) -> None:
    save_config(model.config, directory)  # type: ignore[arg-type]
    with incremental_save(directory / "lit_model.pth") as saver:
        saver.save({name: saver.store_early(fetch(name)) for name in model.state_dict()})
