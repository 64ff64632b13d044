"""Transformers: the descriptions of its causal language models, and, beside them, all else that knows them."""

from fabric_tp.architectures.huggingface.bart import BART, BIGBIRD_PEGASUS, TROCR, WHISPER
from fabric_tp.architectures.huggingface.bert import BERTS
from fabric_tp.architectures.huggingface.bloom import BLOOM
from fabric_tp.architectures.huggingface.cpmant import CPMANT
from fabric_tp.architectures.huggingface.ctrl import CTRL
from fabric_tp.architectures.huggingface.dbrx import DBRX
from fabric_tp.architectures.huggingface.description import BLOCK, HUGGINGFACE
from fabric_tp.architectures.huggingface.granite_moe import GRANITE_MOE
from fabric_tp.architectures.huggingface.hybrid import JAMBA, LFM2, RECURRENT_GEMMA
from fabric_tp.architectures.huggingface.llama4 import LLAMA4
from fabric_tp.architectures.huggingface.mamba import MAMBA, NEMOTRON_H, XLSTM
from fabric_tp.architectures.huggingface.modernbert import MODERNBERT
from fabric_tp.architectures.huggingface.mpt import MPT
from fabric_tp.architectures.huggingface.multimodal import FUYU, MULTIMODAL
from fabric_tp.architectures.huggingface.phi import PHI
from fabric_tp.architectures.huggingface.rwkv import RWKV
from fabric_tp.architectures.huggingface.xglm import BIOGPT, XGLM

__all__ = [
    "BART",
    "BERTS",
    "BIGBIRD_PEGASUS",
    "BIOGPT",
    "BLOCK",
    "BLOOM",
    "CPMANT",
    "CTRL",
    "DBRX",
    "FUYU",
    "GRANITE_MOE",
    "HUGGINGFACE",
    "JAMBA",
    "LFM2",
    "LLAMA4",
    "MAMBA",
    "MODERNBERT",
    "MPT",
    "MULTIMODAL",
    "NEMOTRON_H",
    "PHI",
    "RECURRENT_GEMMA",
    "RWKV",
    "TROCR",
    "WHISPER",
    "XGLM",
    "XLSTM",
]
