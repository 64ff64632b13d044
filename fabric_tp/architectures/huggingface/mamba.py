"""Blocks that are one thing each, and those without attention."""

from dataclasses import replace

from fabric_tp.architectures.architecture import FeedForward, Mixer
from fabric_tp.architectures.huggingface.description import BLOCK, EXPERTS, HUGGINGFACE

NEMOTRON_H = replace(
    HUGGINGFACE,
    name="nemotron_h",
    description="a Transformers Nemotron-H",
    embedding="model.embeddings",
    norm="model.norm_f",
    block=replace(
        BLOCK,
        norms=("norm",),
        mixers=(Mixer("mixer", ("conv1d",)),),
        attention=replace(BLOCK.attention, name="mixer"),
        feed_forward=replace(BLOCK.feed_forward, name="mixer"),
        experts=replace(EXPERTS, name="mixer"),
        one_part=True,
    ),
    tested=(),
)

MAMBA = replace(
    NEMOTRON_H,
    name="mamba",
    description="a Transformers Mamba, Mamba 2 or Falcon Mamba",
    embedding="backbone.embeddings",
    blocks="backbone.layers",
    norm="backbone.norm_f",
)

XLSTM = replace(
    HUGGINGFACE,
    name="xlstm",
    description="a Transformers xLSTM",
    embedding="backbone.embeddings",
    blocks="backbone.blocks",
    norm="backbone.out_norm",
    block=replace(
        BLOCK,
        norms=("norm_mlstm", "norm_ffn"),
        mixers=(Mixer("mlstm_layer"),),
        feed_forward=FeedForward(name="ffn", inputs=("proj_up_gate", "proj_up"), outputs=("proj_down",)),
        experts=None,
    ),
    tested=(),
)
