from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def assert_replicas_in_sync(model: nn.Module) -> None:
    """Compare, within a run, the copies of each parameter that several ranks hold; all ranks must call it.

    Raises:
        AssertionError: Copies differ, for instance because a gradient was not summed; names the first parameters.

    Example::

        optimizer.step()
        assert_replicas_in_sync(model)
    """
    differing = []
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        local = parameter.to_local().detach()
        for axis, placement in enumerate(parameter.placements):
            if placement.is_replicate() and parameter.device_mesh.size(axis) > 1:
                group = parameter.device_mesh.get_group(axis)
                lowest, highest = local.clone(), local.clone()
                dist.all_reduce(lowest, dist.ReduceOp.MIN, group=group)
                dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
                if not torch.equal(lowest, highest):
                    differing.append(f"{name} by up to {(highest - lowest).abs().max().item():.1e}")
    if differing:
        raise AssertionError(f"Copies of {len(differing)} parameters differ between ranks: {'; '.join(differing[:5])}")
