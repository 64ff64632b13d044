"""Tensor, sequence and loss parallelism for Lightning Fabric, for unmodified models."""

from lightning.fabric.strategies import STRATEGY_REGISTRY

from fabric_tp import checkpoint, data, optimizer, random, styles
from fabric_tp.estimate import estimate
from fabric_tp.generate import generate
from fabric_tp.launching import launch
from fabric_tp.loss import count_targets, cross_entropy, linear_cross_entropy
from fabric_tp.parallelize import Parallelize, auto, feed_forward, from_plan, litgpt, llama
from fabric_tp.strategy import TensorParallelStrategy

__version__ = "0.1.0"

__all__ = [
    "Parallelize",
    "TensorParallelStrategy",
    "auto",
    "checkpoint",
    "count_targets",
    "cross_entropy",
    "data",
    "estimate",
    "feed_forward",
    "from_plan",
    "generate",
    "launch",
    "linear_cross_entropy",
    "litgpt",
    "llama",
    "optimizer",
    "random",
    "styles",
]

STRATEGY_REGISTRY.register(
    "tensor_parallel", TensorParallelStrategy, description="Tensor parallelism with FSDP2", override=True
)
