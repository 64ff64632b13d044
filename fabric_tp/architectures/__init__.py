"""What models look like, as plain data: one short file per family. Nothing here knows about ranks."""

from fabric_tp.architectures.architecture import Architecture, Attention, Block, Experts, FeedForward, HeadCounts
from fabric_tp.architectures.feed_forward import FEED_FORWARD
from fabric_tp.architectures.litgpt import LITGPT
from fabric_tp.architectures.llama import LLAMA

KNOWN = (LITGPT, LLAMA, FEED_FORWARD)

__all__ = [
    "FEED_FORWARD",
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
