"""Parameters and gradients for the tests of optimizers."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import fabric_tp
from fabric_tp.shards import copy_shard
from fabric_tp.testing.ranks import mesh
from tests.models import build


def sharded_model(sizes: tuple[int, int]) -> nn.Module:
    model = fabric_tp.litgpt()(build("Llama-3-8B"), mesh(*sizes))
    next(model.parameters()).requires_grad_(False)
    return model


def set_gradients(parameters: list[nn.Parameter], step: int, every: bool = False) -> None:
    """The same, whatever the mesh. Unless ``every``: none for the second parameter, and for the third not at first."""
    generator = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(parameters):
        whole = torch.randn(parameter.shape, generator=generator)
        absent = not every and (index == 1 or (index == 2 and step == 0))
        without = absent or not parameter.requires_grad
        parameter.grad = None if without else torch.zeros_like(parameter.detach())
        if parameter.grad is not None:
            copy_shard(parameter.grad, whole)


def parameters_with_gradients() -> list[nn.Parameter]:
    tensor_parallel = mesh(1, 2)["tensor_parallel"]
    made = []
    for seed in range(3):
        values = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(seed))
        parameter = nn.Parameter(distribute_tensor(values[0], tensor_parallel, [Shard(0)]))
        parameter.grad = distribute_tensor(values[1], tensor_parallel, [Shard(0)])
        made.append(parameter)
    return made
