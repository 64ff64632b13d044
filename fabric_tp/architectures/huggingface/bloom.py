from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import Architecture, Attention, Block, FeedForward, Fused, FusedLayout
from fabric_tp.architectures.heads import HeadCounts


def _counts(attention: nn.Module) -> HeadCounts:
    module: Any = attention
    return HeadCounts(module.num_heads, getattr(module, "num_kv_heads", module.num_heads), module.head_dim)


def _qkv(attention: nn.Module) -> Mapping[str, int]:
    return _counts(attention).qkv


def _layout(attention: nn.Module) -> FusedLayout:
    """Where all heads of a Falcon share a key and a value, these come last."""
    shared = getattr(attention, "multi_query", False) and not getattr(attention, "new_decoder_architecture", False)
    return "consecutive" if shared else "by_group"


BLOOM = Architecture(
    name="bloom",
    description="a Transformers Bloom or Falcon",
    embedding="transformer.word_embeddings",
    before_blocks=("transformer.word_embeddings_layernorm",),
    blocks="transformer.h",
    block=Block(
        norms=("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp"),
        attention=Attention(
            name="self_attention",
            counts=_counts,
            fused={"query_key_value": Fused(_qkv, _layout)},
            outputs=("dense",),
            query_counts=("num_heads",),
            key_value_counts=("num_kv_heads",),
            per_head_arguments=("alibi", "attention_mask"),  # Falcon's mask has ALiBi's biases in it
        ),
        feed_forward=FeedForward(name="mlp", inputs=("dense_h_to_4h",), outputs=("dense_4h_to_h",)),
        dropout_rates=("hidden_dropout", "config.attention_dropout"),
    ),
    norm="transformer.ln_f",
    head="lm_head",
    splits_sequence=("logits_to_keep",),
    measures_embedding=True,
)
