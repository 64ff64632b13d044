from dataclasses import replace

from fabric_tp.architectures.huggingface.xglm import XGLM

BART = replace(
    XGLM,
    name="bart",
    description="a Transformers decoder with the names of BART (mBART, Marian, OPT, Pegasus, Whisper)",
    embedding="model.decoder.embed_tokens",
    positions=("model.decoder.embed_positions",),
    before_blocks=("model.decoder.project_in", "model.decoder.layernorm_embedding"),
    blocks="model.decoder.layers",
    after_blocks=("model.decoder.layer_norm", "model.decoder.final_layer_norm", "model.decoder.project_out"),
    norm="",
    dropout_rates=("model.decoder.dropout", "model.decoder.layerdrop"),
)

assert BART.block is not None
assert BART.block.cross_attention is not None
TROCR = replace(
    BART,
    name="trocr",
    description="a Transformers TrOCR",
    block=replace(
        BART.block,
        attention=replace(BART.block.attention, measures_input=lambda attention: True),
        cross_attention=replace(BART.block.cross_attention, measures_input=lambda attention: True),
    ),
    head="output_projection",
)

WHISPER = replace(BART, name="whisper", description="a Transformers Whisper", head="proj_out")

BIGBIRD_PEGASUS = replace(
    BART,
    name="bigbird_pegasus",
    description="a Transformers BigBird-Pegasus",
    before_blocks=(),
    after_blocks=("model.decoder.layernorm_embedding",),
    classes=("transformers.models.bigbird_pegasus.modeling_bigbird_pegasus.BigBirdPegasusForCausalLM",),
)
"""The norm that others have after the embedding is after its blocks."""
