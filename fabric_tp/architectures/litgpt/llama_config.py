"""Transformers' config of litgpt's Llamas, whose checkpoints may come from a training and not from the hub."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from litgpt import Config

LLAMAS_DIFFER_BY = {
    *("name", "hf_config", "block_size", "vocab_size", "padding_multiple", "padded_vocab_size", "n_layer", "n_embd"),
    *("n_head", "n_query_groups", "head_size", "intermediate_size", "norm_eps", "rope_base", "rope_condense_ratio"),
    "rope_adjustments",
}
"""Fields of litgpt's config."""

ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
"""Llama 3.1's, by litgpt's names and Transformers'."""


def is_llama(config: Config) -> bool:
    """Whether Transformers' class of that name computes the same, by a config that is made here."""
    llama = Config.from_name("Llama-3-8B")
    names = {each.name for each in fields(Config)} - LLAMAS_DIFFER_BY
    scaling = config.rope_adjustments
    is_alike = all(getattr(config, name) == getattr(llama, name) for name in names)
    return is_alike and (scaling is None or scaling.keys() == ROPE_SCALING.keys())


def save_llama_config(config: Config, directory: Path) -> None:
    """Write Transformers' config of a Llama, unless there is one."""
    if (file := directory / "config.json").exists():
        return
    scaling: dict[str, Any] | None = None
    if config.rope_adjustments:
        scaling = {"rope_type": "llama3", **{ROPE_SCALING[key]: each for key, each in config.rope_adjustments.items()}}
    elif config.rope_condense_ratio != 1:
        scaling = {"rope_type": "linear", "factor": float(config.rope_condense_ratio)}
    of_transformers = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        "head_dim": config.head_size,
        "vocab_size": config.padded_vocab_size,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": float(config.rope_base),
        "rope_scaling": scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    file.write_text(json.dumps(of_transformers, indent=2) + "\n")
