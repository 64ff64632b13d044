"""litgpt's configs by name or directory, and models of them."""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Config, lora
from litgpt.config import configs


def load_config(model: str | Path | Config) -> Config:
    """The config of a litgpt model, by name or checkpoint directory.

    Raises:
        ValueError: Neither.
    """
    if isinstance(model, Config):
        return model
    file = Path(model) / "model_config.yaml"
    if file.is_file():
        return Config.from_file(file)
    name = str(model).rpartition("/")[2]
    names = [str(config["name"]) for config in configs]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
        raise ValueError(
            f"{str(model)!r} is neither a name that litgpt knows nor a directory with a model_config.yaml. Names like"
            f" it are {', '.join(close) or ', '.join(names[:5])}."
        )
    return Config.from_name(name)


def with_adapters(config: Config, **options: Any) -> lora.Config:
    """The config of the same model with low-rank adapters; ``options`` are those of ``litgpt.lora.Config``."""
    given = {each.name: getattr(config, each.name) for each in fields(config) if each.init}
    return lora.Config(**given, **options)


def make_model(config: Config) -> GPT:
    """A ``litgpt.GPT``, or with a ``litgpt.lora.Config`` whose ``lora_r`` is above 0 the model whose low-rank adapters
    alone are trained."""
    if not isinstance(config, lora.Config) or config.lora_r == 0:
        return GPT(config)
    model = lora.GPT(config)
    lora.mark_only_lora_as_trainable(model)
    return model


def meta_model(config: Config) -> GPT:
    """A model without memory."""
    with torch.device("meta"):
        return make_model(config)


def yardstick(device_type: str) -> Config:
    """Of a model whose step tells what a device attains: four blocks of Llama-3-8B, narrower for a CPU."""
    config = Config.from_name("Llama-3-8B", n_layer=4)
    if device_type == "cpu":
        small = {"n_embd": 512, "n_head": 8, "n_query_groups": 4, "head_size": 64, "intermediate_size": 1408}
        config = Config.from_name("Llama-3-8B", n_layer=4, padded_vocab_size=2048, block_size=512, **small)
    return config


def model_for_length(config: Config, length: int) -> GPT:
    """A model whose rotary tables are for so many tokens, and in fp32, where Fabric leaves them."""
    model = make_model(config)
    model.max_seq_length = length
    model.reset_parameters()
    return model
