"""Transformers' causal language models made small, their structure kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fabric_tp.architectures.small import HIDDEN, LENGTH, VOCABULARY, WINDOW

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama, tied embeddings": ("Llama", {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"head_dim": 8, "sliding_window": WINDOW}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 16}),
    "Phi3": ("Phi3", {}),
    "Gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": WINDOW}),
    "Gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": WINDOW}),
    "Gemma3, six layers": ("Gemma3", {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 6}),
    "Olmo2": ("Olmo2", {}),
    "GPT-NeoX": ("GPTNeoX", {"num_key_value_heads": None}),
    "GPT-NeoX, one residual after the other": (
        "GPTNeoX",
        {"num_key_value_heads": None, "use_parallel_residual": False},
    ),
    "Mixtral": ("Mixtral", {}),
}
"""Families of Transformers' causal language models, and what their configs need besides small sizes."""


def small_transformers(name: str, **overrides: Any) -> nn.Module:
    """A causal language model of Transformers; ``name`` is a key of ``TRANSFORMERS``.

    Raises:
        ValueError: Transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError("Transformers is not installed: pip install fabric_tp[hf]") from None
    family, options = TRANSFORMERS[name]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4 * LENGTH,
        "pad_token_id": 0,
        "use_cache": False,
    }
    config_class = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    given = {**sizes, **options, **overrides}
    config = config_class(**{name: value for name, value in given.items() if value is not None})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{family}ForCausalLM")(config)
