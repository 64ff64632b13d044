"""litgpt's configs made small, their structure kept."""

from __future__ import annotations

from typing import Any

import torch
from litgpt import GPT, Config
from litgpt.config import configs
from torch import nn

HEAD_SIZE, HIDDEN, VOCABULARY, LENGTH, WINDOW = 8, 96, 96, 16, 5


def names() -> list[str]:
    return [config["name"] for config in configs]


def small_config(name: str, **overrides: Any) -> Config:
    """Two layers of small width: heads and groups, norms, biases, windows, experts and the like stay as they are.

    Where the heads together are as wide as the model, they stay so. Of two layers, one has a sliding window or local
    positions, and one has not, if the model has both.
    """
    full = Config.from_name(name)
    assert full is not None
    assert full.n_query_groups is not None
    head_size = max(HEAD_SIZE, 2 * round(2 / full.rotary_percentage)) if full.rotary_percentage else HEAD_SIZE
    same_width = full.n_embd == (full.head_size or 0) * full.n_head
    sizes: dict[str, Any] = {
        "n_layer": 2,
        "n_embd": head_size * full.n_head if same_width else 64,
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
    config = Config.from_name(name, **{**sizes, **overrides})
    assert config is not None
    return config


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every parameter: norm weights other than one, biases other than zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def small_gpt(config: Config) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(GPT(config))
