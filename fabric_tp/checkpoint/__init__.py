"""Checkpoints in other tools' layouts; Fabric's own ``save`` and ``load`` work on parallelized models as they are."""

from fabric_tp.checkpoint import huggingface, litgpt
from fabric_tp.checkpoint.atomic import replacing
from fabric_tp.checkpoint.conversion import convert

__all__ = ["convert", "huggingface", "litgpt", "replacing"]
