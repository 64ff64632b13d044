"""Checkpoints in other tools' layouts; Fabric's own ``save`` and ``load`` work on parallelized models as they are."""

from fabric_tp.checkpoint import huggingface, litgpt, peft
from fabric_tp.checkpoint.atomic import replacing
from fabric_tp.checkpoint.conversion import convert
from fabric_tp.checkpoint.directory import load, stored_dtype

__all__ = ["convert", "huggingface", "litgpt", "load", "peft", "replacing", "stored_dtype"]
