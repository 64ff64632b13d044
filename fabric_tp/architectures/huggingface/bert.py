"""BERT and its relatives, which call a block's parts the same and what is around the blocks by several names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import Architecture, Attention, Block, FeedForward
from fabric_tp.architectures.heads import HeadCounts


def _counts(attention: nn.Module) -> HeadCounts:
    module: Any = attention
    if hasattr(module, "num_random_blocks"):
        raise ValueError(
            "Attention of the type 'block_sparse' draws blocks for each head by its number, and is replaced where the"
            " sequence is short. Set attention_type='original_full' in the model's config."
        )
    return HeadCounts(module.num_attention_heads, module.num_attention_heads, module.attention_head_size)


BLOCK = Block(
    norms=(
        "attention.output.LayerNorm",
        "output.LayerNorm",
        "attention.ln",  # Megatron-BERT
        "ln",
        "attention.LayerNorm",  # RoBERTa-PreLayerNorm
        "intermediate.LayerNorm",
        "attention.self_attn_layer_norm",  # XLM-RoBERTa-XL
        "LayerNorm",
        "output.adapter_layer_norm",  # X-MOD
        "output.adapter_modules",
    ),
    attention=Attention(
        name="attention.self",
        counts=_counts,
        queries=("query",),
        keys_values=("key", "value"),
        block_outputs=("attention.output.dense",),
        query_counts=("num_attention_heads",),
        head_features=("all_head_size",),
        dropout_rates=("dropout.p",),  # most give it to a kernel, and do not call the module
    ),
    feed_forward=FeedForward(name="", inputs=("intermediate.dense",), outputs=("output.dense",)),
    piece_lengths=("chunk_size_feed_forward",),
)

PREDICTIONS = ("cls.predictions.transform", "cls.predictions.dense", "cls.predictions.LayerNorm")
LM_HEAD = ("lm_head.dense", "lm_head.layer_norm")


def _bert(base: str, head: str, after: tuple[str, ...]) -> Architecture:
    """The description of a model that calls itself ``base``, with the modules ``after`` between blocks and head."""
    return Architecture(
        name="bert",
        description="a Transformers BERT, RoBERTa or another of their relatives",
        embedding=f"{base}.embeddings.word_embeddings",
        before_blocks=(
            f"{base}.embeddings",
            f"{base}.embeddings_project",  # ELECTRA
            f"{base}.encoder.embedding_hidden_mapping_in",  # RemBERT
            f"{base}.encoder.embed_positions",  # RoFormer
        ),
        blocks=f"{base}.encoder.layer",
        block=BLOCK,
        after_blocks=(f"{base}.encoder.ln", f"{base}.encoder.LayerNorm", f"{base}.LayerNorm", *after),
        head=head,
        splits_sequence=("logits_to_keep",),
        head_bias=head.rpartition(".")[0],
        measures_embedding=True,
    )


BERTS = (
    replace(_bert("bert", "cls.predictions.decoder", PREDICTIONS), unused=("bert.pooler",)),  # BigBird's
    _bert("bert", "lm_head.decoder", LM_HEAD),
    _bert("roberta", "lm_head.decoder", LM_HEAD),
    _bert("data2vec_text", "lm_head.decoder", LM_HEAD),
    _bert("electra", "generator_lm_head", ("generator_predictions",)),
    _bert("ernie", "cls.predictions.decoder", PREDICTIONS),
    _bert("rembert", "cls.predictions.decoder", PREDICTIONS),
    _bert("roberta_prelayernorm", "lm_head.decoder", LM_HEAD),
    _bert("roc_bert", "cls.predictions.decoder", PREDICTIONS),
    _bert("roformer", "cls.predictions.decoder", PREDICTIONS),
)
