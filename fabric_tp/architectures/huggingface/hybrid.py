"""Blocks of attention, and blocks of something else in its place."""

from dataclasses import replace

from fabric_tp.architectures.architecture import FeedForward, Mixer
from fabric_tp.architectures.huggingface.description import BLOCK, EXPERTS, HUGGINGFACE

JAMBA = replace(
    HUGGINGFACE,
    name="jamba",
    description="a Transformers Jamba, Bamba or Falcon-H1",
    norm="model.final_layernorm",
    block=replace(
        BLOCK,
        norms=("input_layernorm", "pre_ff_layernorm"),
        feed_forward=replace(BLOCK.feed_forward, name="feed_forward"),
        experts=replace(EXPERTS, name="feed_forward"),
    ),
    tested=(),
)

LFM2 = replace(
    HUGGINGFACE,
    name="lfm2",
    description="a Transformers LFM2",
    norm="model.embedding_norm",
    block=replace(
        BLOCK,
        norms=("operator_norm", "ffn_norm"),
        feed_forward=FeedForward(name="feed_forward", inputs=("w1", "w3"), outputs=("w2",)),
        experts=replace(EXPERTS, name="feed_forward"),
    ),
    tested=(),
)

RECURRENT_GEMMA = replace(
    HUGGINGFACE,
    name="recurrent_gemma",
    description="a Transformers RecurrentGemma",
    norm="model.final_norm",
    block=replace(
        BLOCK,
        norms=("temporal_pre_norm", "channel_pre_norm"),
        mixers=(Mixer("temporal_block", ("rg_lru",)),),
        attention=replace(
            BLOCK.attention,
            name="temporal_block",
            query_counts=("num_attention_heads",),
            key_value_counts=("num_key_value_heads",),
        ),
        feed_forward=replace(BLOCK.feed_forward, name="mlp_block"),
        experts=None,
    ),
    tested=(),
)
