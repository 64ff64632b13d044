"""Tensor, sequence and loss parallelism for Lightning Fabric, for unmodified models."""

from fabric_tp import checkpoint, styles
from fabric_tp.estimate import estimate
from fabric_tp.generate import generate
from fabric_tp.loss import cross_entropy, linear_cross_entropy
from fabric_tp.parallelize import Parallelize, auto, feed_forward, from_plan, litgpt, llama

__version__ = "0.1.0"

__all__ = [
    "Parallelize",
    "auto",
    "checkpoint",
    "cross_entropy",
    "estimate",
    "feed_forward",
    "from_plan",
    "generate",
    "linear_cross_entropy",
    "litgpt",
    "llama",
    "styles",
]
