"""Models with different LM heads, and what they make of some tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fabric_tp
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import LENGTH, VOCABULARY, small_config, small_gpt


def tied_gpt(name: str) -> nn.Module:
    model: Any = small_gpt(small_config(name))
    model.transformer.wte.weight = model.lm_head.weight
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama 3": partial(small_gpt, small_config("Llama-3-8B")),
    "Llama 3, tied": partial(tied_gpt, "Llama-3-8B"),
    "Gemma 2, softcapping": partial(small_gpt, small_config("Gemma-2-2b")),
    "Phi 2, bias": partial(small_gpt, small_config("phi-2")),
    "Pythia": partial(small_gpt, small_config("pythia-14m")),
}


def model_of(name: str = "Llama 3", **options: Any) -> nn.Module:
    return fabric_tp.auto(fused_loss=True, **options)(MODELS[name](), mesh(1, 2))


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def logits_of_one_device(name: str) -> Tensor:
    return MODELS[name]()(tokens())
