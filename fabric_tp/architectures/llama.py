from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import Architecture, Attention, Block, FeedForward, Fused
from fabric_tp.architectures.heads import HeadCounts


def _counts(attention: nn.Module) -> HeadCounts:
    module: Any = attention
    queries = getattr(module, "n_heads", None) or module.n_local_heads
    keys = getattr(module, "n_kv_heads", None) or queries
    return HeadCounts(query=queries, key_value=keys, size=module.wq.out_features // queries)


_BLOCK = Block(
    norms=("attention_norm", "ffn_norm"),
    attention=Attention(
        name="attention",
        counts=_counts,
        queries=("wq",),
        keys_values=("wk", "wv"),
        outputs=("wo",),
        query_norms=("q_norm",),
        key_norms=("k_norm",),
        query_counts=("n_heads", "n_local_heads"),
        key_value_counts=("n_kv_heads", "n_local_kv_heads"),
        group_sizes=("n_rep",),
        dropout_rates=("dropout", "dropout_p", "attn_dropout", "attention_dropout"),
    ),
    feed_forward=FeedForward(name="feed_forward", inputs=("w1", "w3"), outputs=("w2",)),
)

LLAMA = Architecture(
    name="llama",
    description="a Llama in Meta's names (tok_embeddings, layers.*.attention.wq, layers.*.feed_forward.w1, output)",
    embedding="tok_embeddings",
    blocks="layers",
    block=_BLOCK,
    norm="norm",
    head="output",
)


def _fused_counts(attention: nn.Module) -> HeadCounts:
    module: Any = attention
    return HeadCounts(query=module.n_head, key_value=module.n_local_heads, size=module.head_dim)


def _qkv(attention: nn.Module) -> Mapping[str, int]:
    return _fused_counts(attention).qkv


FUSED_LLAMA = replace(
    LLAMA,
    name="fused_llama",
    description="gpt-fast's Llama (layers.*.attention.wqkv)",
    block=replace(
        _BLOCK,
        attention=Attention(
            name="attention",
            counts=_fused_counts,
            fused={"wqkv": Fused(_qkv, "consecutive")},
            outputs=("wo",),
            query_counts=("n_head",),
            key_value_counts=("n_local_heads",),
            head_features=("dim",),
        ),
    ),
)
