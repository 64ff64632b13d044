"""Checkpoints in other tools' layouts; Fabric's own ``save`` and ``load`` work on parallelized models as they are."""

from fabric_tp.checkpoint import litgpt

__all__ = ["litgpt"]
