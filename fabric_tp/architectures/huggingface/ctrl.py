from __future__ import annotations

from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import Architecture, Attention, Block, FeedForward
from fabric_tp.architectures.heads import HeadCounts


def _counts(attention: nn.Module) -> HeadCounts:
    module: Any = attention
    return HeadCounts(module.num_heads, module.num_heads, module.depth)


CTRL = Architecture(
    name="ctrl",
    description="a Transformers CTRL",
    embedding="transformer.w",
    before_blocks=("transformer.dropout",),
    blocks="transformer.h",
    block=Block(
        norms=("layernorm1", "layernorm2"),
        attention=Attention(
            name="multi_head_attention",
            counts=_counts,
            queries=("Wq",),
            keys_values=("Wk", "Wv"),
            outputs=("dense",),
            query_counts=("num_heads",),
            head_features=("d_model_size",),
            same_input=("k", "q"),
        ),
        feed_forward=FeedForward(name="ffn", inputs=("0",), outputs=("2",)),
    ),
    norm="transformer.layernorm",
    head="lm_head",
    splits_sequence=("logits_to_keep",),
    measures_embedding=True,
)
