from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import Architecture, Attention, Block, FeedForward, Fused, FusedLayout
from fabric_tp.architectures.heads import HeadCounts


def _counts(attention: nn.Module) -> HeadCounts:
    module: Any = attention
    if hasattr(module, "n_head"):
        return HeadCounts(module.n_head, module.n_head, module.n_embd // module.n_head)
    heads = module.num_attention_heads if hasattr(module, "num_attention_heads") else module.num_heads
    return HeadCounts(heads, getattr(module, "kv_heads", heads), module.head_dim)


def _qkv(attention: nn.Module) -> Mapping[str, int]:
    return _counts(attention).qkv


def _layout(attention: nn.Module) -> FusedLayout:
    """GPT-BigCode without multi-query attention has the query, key and value of a head side by side."""
    return "consecutive" if getattr(attention, "multi_query", True) else "by_group"


def _measures_input(attention: nn.Module) -> bool:
    return hasattr(attention, "n_head")


_BLOCK = Block(
    norms=("ln_1", "ln_2"),
    attention=Attention(
        name="attn",
        counts=_counts,
        fused={"c_attn": Fused(_qkv, _layout)},
        outputs=("c_proj",),
        query_counts=("num_heads", "n_head"),
        key_value_counts=("kv_heads",),
        group_sizes=("num_key_value_groups",),
        head_features=("embed_dim", "split_size", "n_embd"),
        measures_input=_measures_input,
        dropout_rates=("attn_dropout.p", "attn_dropout", "dropout"),
        output_dropouts=("resid_dropout",),
    ),
    feed_forward=FeedForward(
        name="mlp", inputs=("c_fc", "fc_in"), outputs=("c_proj", "fc_out"), output_dropouts=("dropout",)
    ),
)

GPT2 = Architecture(
    name="gpt2",
    description="a GPT-2 or GPT-BigCode of Transformers, or a nanoGPT",
    embedding="transformer.wte",
    positions=("transformer.wpe",),
    before_blocks=("transformer.drop",),
    blocks="transformer.h",
    block=_BLOCK,
    norm="transformer.ln_f",
    head="lm_head",
    splits_sequence=("logits_to_keep",),
    measures_embedding=True,
    measures_output=True,
)

_SEPARATE = Attention(
    name="attn",
    counts=_counts,
    queries=("q_proj",),
    keys_values=("k_proj", "v_proj"),
    outputs=("out_proj",),
    query_counts=("num_heads", "num_attention_heads"),
    output_dropouts=("resid_dropout",),
)

GPTJ = replace(
    GPT2,
    name="gptj",
    description="a Transformers GPT-J",
    block=replace(_BLOCK, attention=_SEPARATE),
)

GPT_NEO = replace(
    GPT2,
    name="gpt_neo",
    description="a Transformers GPT-Neo",
    block=replace(_BLOCK, attention=replace(_SEPARATE, name="attn.attention")),
)
