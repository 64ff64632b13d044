from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import Architecture, Attention, Block, FeedForward, Fused
from fabric_tp.architectures.heads import HeadCounts


def _counts(attention: nn.Module) -> HeadCounts:
    module: Any = attention
    heads = module.query_key_value.out_features // (3 * module.head_size)
    return HeadCounts(query=heads, key_value=heads, size=module.head_size)


def _qkv(attention: nn.Module) -> Mapping[str, int]:
    counts = _counts(attention)
    return dict.fromkeys(("q", "k", "v"), counts.query * counts.size)


_BLOCK = Block(
    norms=("input_layernorm", "post_attention_layernorm"),
    attention=Attention(
        name="attention",
        counts=_counts,
        fused={"query_key_value": Fused(_qkv, "by_group")},
        outputs=("dense",),
        query_counts=("num_attention_heads",),
        returned=("dense_bias",),
        dropout_rates=("attention_dropout",),
    ),
    feed_forward=FeedForward(name="mlp", inputs=("dense_h_to_4h",), outputs=("dense_4h_to_h",)),
)

GPT_NEOX = Architecture(
    name="gpt_neox",
    description="a Transformers GPT-NeoX (Pythia, GPT-NeoX-20B)",
    embedding="gpt_neox.embed_in",
    blocks="gpt_neox.layers",
    block=_BLOCK,
    norm="gpt_neox.final_layer_norm",
    head="embed_out",
    splits_sequence=("logits_to_keep",),
    measures_embedding=True,
    tested=("transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXForCausalLM",),
)

GPT_NEOX_JAPANESE = replace(
    GPT_NEOX,
    name="gpt_neox_japanese",
    description="a Transformers GPT-NeoX-Japanese",
    embedding="gpt_neox_japanese.embed_in",
    blocks="gpt_neox_japanese.layers",
    block=replace(_BLOCK, dropout_rates=("hidden_dropout",)),
    norm="gpt_neox_japanese.final_layer_norm",
    tested=(),
)
