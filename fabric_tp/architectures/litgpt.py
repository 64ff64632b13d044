from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fabric_tp.architectures.architecture import Architecture, Attention, Block, FeedForward


def _qkv_rows(attention: nn.Module) -> Mapping[str, int]:
    config = attention.config
    keys = config.n_query_groups * config.head_size  # type: ignore[union-attr, operator]
    return {"q": config.n_head * config.head_size, "k": keys, "v": keys}  # type: ignore[union-attr, operator, dict-item]


LITGPT = Architecture(
    name="litgpt",
    description="litgpt.GPT",
    embedding="transformer.wte",
    blocks="transformer.h",
    block=Block(
        norms=("norm_1", "post_attention_norm", "norm_2", "post_mlp_norm"),
        attention=Attention(
            name="attn",
            heads=("config.n_head", "config.n_query_groups"),
            fused={"qkv": _qkv_rows},
            outputs=("proj",),
        ),
        feed_forward=FeedForward(name="mlp", inputs=("fc", "fc_1", "fc_2"), outputs=("proj",)),
    ),
    norm="transformer.ln_f",
    head="lm_head",
)
