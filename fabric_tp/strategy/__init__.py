"""All that Fabric meets: the strategy, launching, failure, precision, clipping, optimizers."""

from fabric_tp.strategy.launching import launch
from fabric_tp.strategy.strategy import TensorParallelStrategy

__all__ = ["TensorParallelStrategy", "launch"]
