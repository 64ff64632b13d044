"""Models of the known families made small, their structure kept, with values that hide no mistake."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fabric_tp.architectures.huggingface import small as huggingface
from fabric_tp.architectures.huggingface.small import TRANSFORMERS as TRANSFORMERS
from fabric_tp.architectures.huggingface.small import causal_types as causal_types
from fabric_tp.architectures.huggingface.small import small_inputs as small_inputs
from fabric_tp.architectures.litgpt import small as litgpt
from fabric_tp.architectures.litgpt.small import LORA as LORA
from fabric_tp.architectures.litgpt.small import names as names
from fabric_tp.architectures.litgpt.small import one_of_each_structure as one_of_each_structure
from fabric_tp.architectures.litgpt.small import small_config as small_config
from fabric_tp.architectures.small import LENGTH as LENGTH
from fabric_tp.architectures.small import VOCABULARY as VOCABULARY

OWN_GENERATE = {"litgpt": litgpt.own_generate, "huggingface": huggingface.own_generate}
"""By the library, its own way to continue a batch of prompts with the likeliest tokens."""


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every parameter: norm weights other than one, biases other than zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def small_gpt(config: Any) -> nn.Module:
    """A ``litgpt.GPT`` of this config."""
    return randomize(litgpt.small_gpt(config))


def small_lora(name: str, adapted: str, **overrides: Any) -> nn.Module:
    """A ``litgpt.lora.GPT`` of which only the adapters are to be trained; ``adapted`` is a key of ``LORA``."""
    return randomize(litgpt.small_lora(name, adapted, **overrides))


def small_transformers(name: str, **overrides: Any) -> nn.Module:
    """A causal language model of Transformers; ``name`` is a key of ``TRANSFORMERS``.

    Raises:
        ValueError: Transformers is not installed.
    """
    return randomize(huggingface.small_transformers(name, **overrides))


def small_causal(model_type: str, **overrides: Any) -> nn.Module:
    """A causal language model of Transformers; ``model_type`` is one of :func:`causal_types`.

    Raises:
        ValueError: Transformers is not installed.
    """
    return randomize(huggingface.small_causal(model_type, **overrides))
