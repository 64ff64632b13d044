"""The least memory that training a litgpt model can take, by formula."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from litgpt import Config


def least_memory(
    model: nn.Module,
    *,
    tensor_parallel_size: int,
    data_parallel_size: int,
    tokens: int,
    precision: str,
    activation_checkpointing: str,
    reshard_after_forward: bool,
    fused_loss: bool,
    quantized: int = 0,
) -> dict[str, int]:
    """The limits by formula, in bytes on each rank, for ``tokens`` tokens of each data-parallel rank.

    Parameters, gradients and AdamW's two states divide by all ranks; of frozen parameters there are no gradients and
    states, and those of them that are ``quantized``, four bits a number and an fp32 scale for 64, divide by t only.
    With width h, all query heads q wide, all key and value heads k each, MLP f, vocabulary v, t tensor-parallel ranks
    and e bytes a number, a layer must keep for the backward, of each token, the inputs of attention and MLP, the
    attention's q, k, v and result, and what the MLP's first layers give: ``e (2 h + 2 q + 2 k + 2 f) / t`` (one f
    without a gate; times the experts that a token visits); with full checkpointing ``e h / t``, and with selective
    ``e (2 h + q) / t``. Where only some layers have adapters it is less. The logits and their gradient take
    ``2 e v / t``, or nothing where loss and head are one. Collectives need the input of one attention or MLP whole,
    ``e h`` per token, and FSDP2 the parameters of one block, or of all if none are freed after the forward.
    """
    config: Config = model.config  # type: ignore[assignment]
    size, dtype_size = tensor_parallel_size, 4 if precision == "32-true" else 2
    stored, trained = (
        math.ceil((2 if precision == "bf16-true" else 4) * numbers / (size * data_parallel_size))
        for numbers in (
            sum(parameter.numel() for parameter in model.parameters()) - quantized,
            sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        )
    )
    width, attention = config.n_embd, config.n_head * config.head_size
    key_value = config.n_query_groups * config.head_size
    experts = config.n_expert_per_token if config.mlp_class_name == "LLaMAMoE" else 1
    hidden = config.moe_intermediate_size if experts > 1 and config.moe_intermediate_size else config.intermediate_size
    gated = 1 if config.mlp_class_name == "GptNeoxMLP" else 2
    kept = {
        "none": 2 * width + 2 * attention + 2 * key_value + gated * hidden * experts,
        "selective": 2 * width + attention,
        "full": width,
    }[activation_checkpointing]
    blocks = sum(parameter.numel() for parameter in model.get_submodule("transformer.h").parameters()) - quantized
    whole = 0 if data_parallel_size == 1 else blocks // config.n_layer if reshard_after_forward else blocks
    gathered = (tokens * width if size > 1 else 0) + whole // size
    logits = 0 if fused_loss else tokens * config.padded_vocab_size * 2 * dtype_size
    return {
        "parameters": stored + math.ceil(quantized * (4 + 32 / 64) / 8 / size),
        "gradients": trained,
        "optimizer state": 2 * trained,
        "activations": tokens * config.n_layer * kept * dtype_size // size,
        "logits and loss": logits // size,
        "collective buffers": gathered * dtype_size,
    }
