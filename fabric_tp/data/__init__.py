"""Inputs that are the same on all ranks of a tensor-parallel group, from any dataloader."""

from fabric_tp.data.inputs import Inputs
from fabric_tp.data.loader import ParallelDataLoader
from fabric_tp.data.samples import SeededSamples

__all__ = ["Inputs", "ParallelDataLoader", "SeededSamples"]
