"""Floating-point operations that a litgpt model's training step is said to have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from litgpt import GPT


def model_flops(model: GPT, tokens: int, sequence_length: int) -> int:
    """Of forward and backward, by which the share of a device's peak (MFU) is told.

    Six for each weight of a layer and token, and ``12 x layers x width of all heads x sequence_length`` for each token,
    whatever a causal kernel leaves out and whatever is computed again (Chowdhery et al., "PaLM: scaling language
    modeling with pathways", 2022, appendix B). Of experts those that a token visits.

    Args:
        model: May be on the meta device.
        tokens: Of all samples.
        sequence_length: Of a sample.
    """
    config = model.config
    visited = config.n_expert_per_token / config.n_expert if config.n_expert else 1.0
    weights = sum(
        parameter.numel() * (visited if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and not name.endswith("wte.weight")
    )
    heads = config.n_head * (config.head_size or config.n_embd // config.n_head)
    return int(tokens * (6 * weights + 12 * config.n_layer * heads * sequence_length))
