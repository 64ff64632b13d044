from __future__ import annotations

from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import Architecture, Attention, Block, FeedForward
from fabric_tp.architectures.heads import HeadCounts


def _counts(attention: nn.Module) -> HeadCounts:
    module: Any = attention
    return HeadCounts(module.num_heads, module.num_heads, module.dim_head)


CPMANT = Architecture(
    name="cpmant",
    description="a Transformers CPM-Ant",
    embedding="cpmant.input_embedding",
    before_blocks=("cpmant.segment_embedding", "cpmant.position_bias"),
    blocks="cpmant.encoder.layers",
    block=Block(
        norms=("self_att.layernorm_before_attention", "ffn.layernorm_before_ffn"),
        attention=Attention(
            name="self_att.self_attention",
            counts=_counts,
            queries=("project_q",),
            keys_values=("project_k", "project_v"),
            outputs=("attention_out",),
            query_counts=("num_heads",),
            same_input=("hidden_kv",),
            per_head_arguments=("position_bias",),
        ),
        feed_forward=FeedForward(name="ffn.ffn", inputs=("w_in.w_0", "w_in.w_1"), outputs=("w_out",)),
    ),
    norm="cpmant.encoder.output_layernorm",
    head="lm_head",
    splits_sequence=("logits_to_keep",),
    measures_embedding=True,
    measures_output=True,
)
