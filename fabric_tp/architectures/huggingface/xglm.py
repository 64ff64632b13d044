from dataclasses import replace

from fabric_tp.architectures.architecture import FeedForward
from fabric_tp.architectures.huggingface.description import BLOCK, HUGGINGFACE

XGLM = replace(
    HUGGINGFACE,
    name="xglm",
    description="a Transformers XGLM",
    block=replace(
        BLOCK,
        norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        feed_forward=FeedForward(name="", inputs=("fc1",), outputs=("fc2",), takes_rows=True),
        cross_attention=replace(BLOCK.attention, name="encoder_attn", key_value_input="key_value_states"),
        dropout_rates=("dropout", "activation_dropout"),
    ),
    dropout_rates=("model.dropout", "model.layerdrop"),
    norm="model.layer_norm",
    tested=(),
)

BIOGPT = replace(
    XGLM,
    name="biogpt",
    description="a Transformers BioGPT",
    embedding="biogpt.embed_tokens",
    positions=("biogpt.embed_positions",),
    blocks="biogpt.layers",
    dropout_rates=("biogpt.dropout", "biogpt.layerdrop"),
    norm="biogpt.layer_norm",
    head="output_projection",
)
