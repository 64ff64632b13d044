from __future__ import annotations

from dataclasses import replace

from fabric_tp.architectures.huggingface import BLOCK, HUGGINGFACE

# Hand-written models with the names of Transformers in them, often without a config: counts are attributes.
BASE_MODEL = replace(
    HUGGINGFACE,
    name="base_model",
    description="a hand-written Llama with base_model.layers.*.self_attn.q_proj",
    embedding="base_model.embed_tokens",
    blocks="base_model.layers",
    block=replace(
        BLOCK,
        attention=replace(
            BLOCK.attention,
            query_counts=(*BLOCK.attention.query_counts, "n_heads", "num_attention_heads"),
            key_value_counts=(*BLOCK.attention.key_value_counts, "n_kv_heads", "num_kv_heads"),
            group_sizes=(*BLOCK.attention.group_sizes, "n_rep", "num_kv_groups"),
            dropout_rates=(*BLOCK.attention.dropout_rates, "dropout", "dropout_p", "attn_dropout"),
        ),
    ),
    norm="base_model.norm",
    tested=(),
)
