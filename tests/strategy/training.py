"""Losses and gradients on the ranks of the pool."""

from __future__ import annotations

import lightning as L
from torch import Tensor, nn

import fabric_tp
from fabric_tp.shards import gather_shards
from tests.fabric import batch


def step_loss(fabric: L.Fabric, model: nn.Module, size: int = 4, seed: int = 0) -> Tensor:
    inputs, targets = batch(fabric, size, seed)
    return fabric_tp.cross_entropy(model(inputs), targets)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: gather_shards(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: gather_shards(p).clone() for name, p in model.named_parameters()}
