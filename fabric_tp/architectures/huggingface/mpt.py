from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import Architecture, Attention, Block, FeedForward, Fused
from fabric_tp.architectures.heads import HeadCounts


def _counts(attention: nn.Module) -> HeadCounts:
    module: Any = attention
    return HeadCounts(module.n_heads, module.n_heads, module.head_dim)


def _qkv(attention: nn.Module) -> Mapping[str, int]:
    counts = _counts(attention)
    return dict.fromkeys(("q", "k", "v"), counts.query * counts.size)


MPT = Architecture(
    name="mpt",
    description="a Transformers MPT",
    embedding="transformer.wte",
    blocks="transformer.blocks",
    block=Block(
        norms=("norm_1", "norm_2"),
        attention=Attention(
            name="attn",
            counts=_counts,
            fused={"Wqkv": Fused(_qkv, "consecutive")},
            outputs=("out_proj",),
            query_counts=("n_heads",),
            per_head_arguments=("position_bias",),
            dropout_rates=("attn_dropout_p",),
        ),
        feed_forward=FeedForward(name="ffn", inputs=("up_proj",), outputs=("down_proj",)),
        dropout_rates=("ffn.hidden_dropout",),
    ),
    norm="transformer.norm_f",
    head="lm_head",
    splits_sequence=("logits_to_keep",),
    measures_embedding=True,
)
