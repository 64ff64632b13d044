"""What the styles with random numbers share: a module that follows the run's position."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fabric_tp.autograd.run_position import RunPosition
from fabric_tp.styles.style import LocalModule


def follow_run(model: nn.Module, mesh: DeviceMesh, seed: int) -> RunPosition:
    """Give the model's parallelized dropouts the position that their masks depend on.

    The model's training forwards advance it from here on.
    """
    replicas = mesh["data_parallel"] if "data_parallel" in (mesh.mesh_dim_names or ()) else None
    position = RunPosition(seed, *((replicas.get_local_rank(), replicas.size()) if replicas is not None else ()))
    for name, module in model.named_modules():
        if isinstance(module, Follower):
            module.follow(position, name)
    model.register_forward_pre_hook(position.begin, with_kwargs=True)
    return position


def has_followers(model: nn.Module) -> bool:
    return any(isinstance(module, Follower) for module in model.modules())


def run_position(model: nn.Module) -> RunPosition | None:
    """The position that :func:`follow_run` gave to the model, if it did."""
    return next((module.position for module in model.modules() if isinstance(module, Follower)), None)


class Follower(LocalModule):
    """A parallelized module that computes with random numbers."""

    position: RunPosition | None = None
    name_in_model: str = ""

    def follow(self, position: RunPosition, name: str) -> None:
        self.position, self.name_in_model = position, name

    def followed(self) -> RunPosition:
        if self.position is None:
            raise ValueError(
                f"This {type(self).__name__} does not know the seed. fabric_tp.from_plan(plan) tells it when it"
                " parallelizes the model; torch's own parallelize_module does not."
            )
        return self.position


class RandomModule(Follower):
    """Computes with torch's generators in a state of the call's own."""

    by_rank = False
    """Each tensor-parallel rank has a state of its own."""

    @torch.compiler.disable
    def compute(self, *args: Any, **kwargs: Any) -> Any:
        this = self.parallelized
        if not self.training:
            return super().compute(*args, **kwargs)
        part = this.group.rank if self.by_rank else 0
        with self.followed().seeded(self.name_in_model, torch.device(this.mesh.device_type), part):
            return super().compute(*args, **kwargs)
