"""What models look like, as plain data: one short file per family. Nothing here knows about ranks."""

from torch import nn

from fabric_tp.architectures.architecture import (
    Architecture,
    Attention,
    Block,
    Experts,
    FeedForward,
    Fused,
    Mixer,
    Stacked,
)
from fabric_tp.architectures.base_model import BASE_MODEL
from fabric_tp.architectures.feed_forward import FEED_FORWARD
from fabric_tp.architectures.gpt2 import GPT2, GPT_NEO, GPTJ
from fabric_tp.architectures.gpt_neox import GPT_NEOX, GPT_NEOX_JAPANESE
from fabric_tp.architectures.heads import HeadCounts
from fabric_tp.architectures.huggingface import (
    BART,
    BERTS,
    BIGBIRD_PEGASUS,
    BIOGPT,
    BLOOM,
    CPMANT,
    CTRL,
    DBRX,
    FUYU,
    GRANITE_MOE,
    HUGGINGFACE,
    JAMBA,
    LFM2,
    LLAMA4,
    MAMBA,
    MODERNBERT,
    MPT,
    MULTIMODAL,
    NEMOTRON_H,
    PHI,
    RECURRENT_GEMMA,
    RWKV,
    TROCR,
    WHISPER,
    XGLM,
    XLSTM,
)
from fabric_tp.architectures.litgpt import LITGPT
from fabric_tp.architectures.llama import FUSED_LLAMA, LLAMA
from fabric_tp.architectures.names import has
from fabric_tp.architectures.wrappers import WRAPPERS, within

KNOWN = (
    LITGPT,
    LLAMA,
    FUSED_LLAMA,
    HUGGINGFACE,
    LLAMA4,
    MULTIMODAL,
    FUYU,
    GRANITE_MOE,
    DBRX,
    PHI,
    GPT_NEOX,
    GPT_NEOX_JAPANESE,
    XGLM,
    BIOGPT,
    BIGBIRD_PEGASUS,
    BART,
    TROCR,
    WHISPER,
    JAMBA,
    LFM2,
    RECURRENT_GEMMA,
    NEMOTRON_H,
    MAMBA,
    XLSTM,
    RWKV,
    GPT2,
    GPTJ,
    GPT_NEO,
    BLOOM,
    MPT,
    CTRL,
    CPMANT,
    *BERTS,
    MODERNBERT,
    BASE_MODEL,
    FEED_FORWARD,
)


def recognise(model: nn.Module) -> Architecture:
    """The architecture of a model, by the names of its modules.

    Raises:
        ValueError: It is none of the known ones.
    """
    for architecture in KNOWN:
        if architecture.matches(model):
            return architecture
    for wrapper in WRAPPERS:
        for architecture in KNOWN:
            if architecture.block and has(model, wrapper) and architecture.matches(model.get_submodule(wrapper)):
                return within(architecture, wrapper)
    known = "; ".join(dict.fromkeys(f"{architecture.name}: {architecture.description}" for architecture in KNOWN))
    raise ValueError(
        f"The architecture of this {type(model).__name__} is not known. Known are: {known}. For any other model write a"
        " plan and use fabric_tp.from_plan(plan)."
    )


__all__ = [
    "BASE_MODEL",
    "FEED_FORWARD",
    "GPT_NEOX",
    "HUGGINGFACE",
    "KNOWN",
    "LITGPT",
    "LLAMA",
    "Architecture",
    "Attention",
    "Block",
    "Experts",
    "FeedForward",
    "Fused",
    "HeadCounts",
    "Mixer",
    "Stacked",
    "recognise",
]
