from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import Architecture, Attention, Block, Experts, FeedForward, Fused
from fabric_tp.architectures.heads import AdaptedHeads, HeadCounts


def _counts(attention: nn.Module) -> HeadCounts:
    config: Any = attention.config
    return HeadCounts(query=config.n_head, key_value=config.n_query_groups, size=config.head_size)


def _qkv(attention: nn.Module) -> Mapping[str, int]:
    return _counts(attention).qkv


def _changed(adapter: nn.Module) -> tuple[str, ...]:
    module: Any = adapter
    if not hasattr(module, "enable_lora"):  # of litgpt.adapter_v2, whose parameters no style covers
        return ()
    return tuple(part for part, enabled in zip("qkv", module.enable_lora, strict=True) if enabled and module.r > 0)


def _shared_norm(block: nn.Module) -> str | None:
    config: Any = block.config
    forward: Any = type(block).forward
    known = (forward.__module__, forward.__qualname__) == ("litgpt.model", "Block.forward")
    return "norm_1" if known and config.parallel_residual and config.shared_attention_norm else None


LITGPT = Architecture(
    name="litgpt",
    description="litgpt.GPT or litgpt.lora.GPT",
    embedding="transformer.wte",
    blocks="transformer.h",
    block=Block(
        norms=("norm_1", "post_attention_norm", "norm_2", "post_mlp_norm"),
        attention=Attention(
            name="attn",
            counts=_counts,
            fused={"qkv": Fused(_qkv, "consecutive")},
            adapted=AdaptedHeads(
                changed=_changed,
                query_counts=("n_head",),
                key_value_counts=("n_query_groups",),
                row_counts=("qkv_shapes",),
                row_indices=("_lora_ind",),
            ),
            queries=("q_b_proj",),
            keys_values=("kv_b_proj",),
            outputs=("proj",),
            query_norms=("norm_q",),
            key_norms=("norm_k",),
            whole=("q_a_proj", "q_a_norm", "kv_a_proj_with_mqa", "kv_a_norm"),
            query_counts=("config.n_head",),
            key_value_counts=("config.n_query_groups",),
        ),
        feed_forward=FeedForward(name="mlp", inputs=("fc", "fc_1", "fc_2"), outputs=("proj",)),
        experts=Experts(name="mlp", router="gate", experts="experts", shared=("shared_experts",)),
        shared_norm=_shared_norm,
    ),
    norm="transformer.ln_f",
    head="lm_head",
    lean="fabric_tp.architectures.litgpt.lean:LEAN",
    splits_sequence=("lm_head_chunk_size",),
    tested=("litgpt.model.GPT", "litgpt.lora.GPT"),
    computes_samples_apart=("litgpt.model.GPT",),  # adapters put their parts together first, for a block at a time
)
