"""Which model is trained: one of litgpt's, or a tiny one, with the changes that were asked for."""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from arguments import Args
from checkpoint_dir import check_checkpoint_dir
from litgpt import GPT, Config, lora
from litgpt.config import name_to_config
from torch import nn

TINY_LLAMA_3: dict[str, Any] = {
    "name": "tiny-llama-3",
    "block_size": 1024,
    "vocab_size": 1024,
    "padding_multiple": 64,
    "n_layer": 4,
    "n_embd": 128,
    "n_head": 8,
    "n_query_groups": 4,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 384,
    "rope_base": 500000,
    "rope_adjustments": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 512},
}


def model_config(args: Args) -> Config:
    known = {each.name for each in fields(Config)}
    for name in args.model.keys() - known:
        raise ValueError(f"--model.{name}: litgpt's Config has no {name!r}.{did_you_mean(name, known)}")
    directory = args.initial_checkpoint_dir
    if directory is not None:
        check_checkpoint_dir(directory)

    def make(**changes: Any) -> Config:
        if directory is not None:
            return Config.from_checkpoint(directory, **changes)
        if args.model_name == TINY_LLAMA_3["name"]:
            return Config(**{**TINY_LLAMA_3, **changes})
        return Config.from_name(args.model_name, **changes)  # type: ignore[return-value]

    try:
        name = make().name
    except ValueError as error:
        hint = did_you_mean(args.model_name, [TINY_LLAMA_3["name"], *name_to_config])
        raise ValueError(f"--model_name {args.model_name!r} is not known.{hint}") from error
    try:
        config = make(**args.model)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"--model {args.model} does not fit {name}: litgpt cannot make a Config of it.") from error
    if args.dropout and (config.post_attention_norm or config.post_mlp_norm):
        raise ValueError(f"--dropout {args.dropout}: {config.name} has norms where the dropout would go. Use 0.")
    if not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout {args.dropout} must lie in [0, 1), for example 0.1.")
    if args.max_seq_length > config.block_size:
        raise ValueError(f"max_seq_length={args.max_seq_length} is above {config.name}'s {config.block_size}.")
    return config


def did_you_mean(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    return f" Did you mean {' or '.join(matches)}?" if matches else ""


def make_model(args: Args, config: Config) -> GPT:
    model = lora.GPT(config) if isinstance(config, lora.Config) else GPT(config)
    if args.dropout:
        for block in model.transformer.h:  # type: ignore[union-attr]
            # litgpt has no dropout. Here is where other models have theirs, and where nothing is unless the model has
            # norms there.
            block.post_attention_norm, block.post_mlp_norm = nn.Dropout(args.dropout), nn.Dropout(args.dropout)
    return model
