"""What models look like, as plain data: one short file per family. Nothing here knows about ranks."""

from fabric_tp.architectures.architecture import Architecture, Attention, Block, Experts, FeedForward, HeadCounts
from fabric_tp.architectures.base_model import BASE_MODEL
from fabric_tp.architectures.feed_forward import FEED_FORWARD
from fabric_tp.architectures.huggingface import HUGGINGFACE
from fabric_tp.architectures.litgpt import LITGPT
from fabric_tp.architectures.llama import LLAMA

KNOWN = (LITGPT, LLAMA, HUGGINGFACE, BASE_MODEL, FEED_FORWARD)

__all__ = [
    "BASE_MODEL",
    "FEED_FORWARD",
    "HUGGINGFACE",
    "KNOWN",
    "LITGPT",
    "LLAMA",
    "Architecture",
    "Attention",
    "Block",
    "Experts",
    "FeedForward",
    "HeadCounts",
]
