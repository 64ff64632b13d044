"""The factories, and the order of the steps by which they parallelize a model."""

from fabric_tp.parallelize.factories import Parallelize, auto, feed_forward, from_plan, litgpt, llama
from fabric_tp.parallelize.options import ActivationCheckpointing, BlockOptions, MixedPrecision, documented
from fabric_tp.parallelize.parallelize import Derived, ParallelizeByPlan
from fabric_tp.plan import TransformerOptions

__all__ = [
    "ActivationCheckpointing",
    "BlockOptions",
    "Derived",
    "MixedPrecision",
    "Parallelize",
    "ParallelizeByPlan",
    "TransformerOptions",
    "auto",
    "documented",
    "feed_forward",
    "from_plan",
    "litgpt",
    "llama",
]
