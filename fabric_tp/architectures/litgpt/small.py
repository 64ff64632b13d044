"""litgpt's models made small, their structure kept."""

from __future__ import annotations

from typing import Any

import torch
from litgpt import GPT, Config, lora
from litgpt.config import configs
from litgpt.generate.base import generate
from litgpt.model import GroupedTopkRouter
from torch import Tensor, nn

from fabric_tp.architectures.small import HEAD_SIZE, HIDDEN, LENGTH, VOCABULARY, WIDTH, WINDOW

STRUCTURE = (
    "norm_class_name",
    "mlp_class_name",
    "bias",
    "attn_bias",
    "lm_head_bias",
    "parallel_residual",
    "shared_attention_norm",
    "norm_qk",
    "norm_qk_type",
    "post_mlp_norm",
    "sliding_window_size",
    "attention_logit_softcapping",
    "rope_local_base_freq",
    "moe_intermediate_size",
)
"""Of these options of a litgpt config it matters which are set, or, where they are words, to what."""

LORA: dict[str, dict[str, Any]] = {
    "every layer": dict.fromkeys([f"lora_{n}" for n in ("query", "key", "value", "projection", "mlp", "head")], True),
    "query and value": {"lora_query": True, "lora_value": True},
    "MLP": {"lora_mlp": True},
}


def names() -> list[str]:
    return [config["name"] for config in configs]


def one_of_each_structure() -> list[str]:
    """The first of litgpt's configs with each combination of features."""
    found: dict[tuple[Any, ...], str] = {}
    for name in names():
        config = Config.from_name(name)
        assert config is not None
        values = [getattr(config, option) for option in STRUCTURE]
        grouped = (config.n_query_groups == 1, config.n_query_groups == config.n_head, "OLMo" in name)
        found.setdefault((*(v if isinstance(v, str) else bool(v) for v in values), *grouped), name)
    return list(found.values())


def small_config(name: str, config_class: type[Config] = Config, **overrides: Any) -> Config:
    """Two layers of small width: heads and groups, norms, biases, windows, experts and the like stay as they are.

    Where the heads together are as wide as the model, they stay so, and otherwise not. Of two layers, one has a sliding
    window or local positions, and one has not, if the model has both.
    """
    full = Config.from_name(name)
    assert full is not None
    assert full.n_query_groups is not None
    head_size = max(HEAD_SIZE, 2 * round(2 / full.rotary_percentage)) if full.rotary_percentage else HEAD_SIZE
    same_width = full.n_embd == (full.head_size or 0) * full.n_head
    sizes: dict[str, Any] = {
        "n_layer": 2,
        "n_embd": head_size * full.n_head if same_width else WIDTH,
        "head_size": head_size,
        "intermediate_size": HIDDEN,
        "block_size": 4 * LENGTH,
        "vocab_size": VOCABULARY - 5,
        "padded_vocab_size": VOCABULARY,
    }
    if full.sliding_window_size is not None:
        indices = full.sliding_window_indices or [1]
        sizes |= {"sliding_window_size": WINDOW, "sliding_window_indices": [max(indices), min(indices)]}
    if full.rope_indices is not None:
        sizes["rope_indices"] = [max(full.rope_indices), min(full.rope_indices)]
    if full.n_expert:
        sizes |= {"n_expert": min(full.n_expert, 6), "n_expert_per_token": min(full.n_expert_per_token, 2)}
        sizes["moe_intermediate_size"] = HIDDEN // 2 if full.moe_intermediate_size else None
    config = config_class.from_name(name, **{**sizes, **overrides})
    assert config is not None
    return config


def small_gpt(config: Config) -> nn.Module:
    """As litgpt initialises it, from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(config)
    for module in model.modules():
        if isinstance(module, GroupedTopkRouter):
            nn.init.zeros_(module.weight)  # litgpt leaves whatever was in memory
    return model


def small_lora(name: str, adapted: str, **overrides: Any) -> nn.Module:
    """A ``litgpt.lora.GPT`` of which only the adapters are to be trained; ``adapted`` is a key of ``LORA``."""
    config = small_config(name, lora.Config, lora_r=4, **{**LORA[adapted], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = lora.GPT(config)
    lora.mark_only_lora_as_trainable(model)
    return model


def own_generate(model: nn.Module, prompts: list[Tensor], max_new_tokens: int) -> list[Tensor]:
    """Each prompt with the likeliest continuation, by litgpt's own function.

    Raises:
        ValueError: A prompt is longer than a sliding window of the model.
    """
    gpt: Any = model
    continued = []
    for prompt in prompts:
        gpt.set_kv_cache(1)
        continued.append(generate(gpt, prompt, len(prompt) + max_new_tokens, temperature=0.0).clone())
        gpt.clear_kv_cache()
    return continued
