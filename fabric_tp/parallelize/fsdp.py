"""FSDP2 over the data-parallel ranks, block by block."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fabric_tp.parallelize.options import BlockOptions


def shard_over_data_parallel(
    model: nn.Module,
    blocks: list[nn.Module],
    ends: list[list[nn.Module]],
    mesh: DeviceMesh | None,
    options: BlockOptions,
) -> None:
    """Shard each block, each of the ends, and what is left; nothing on one rank without mixed precision.

    Args:
        blocks: Gathered one by one, in this order.
        ends: What comes before the blocks and what after them: needed at different times.
        mesh: The data-parallel ranks.
    """
    if mesh is None or not is_sharded(mesh, options):
        return
    shard: Any = partial(fully_shard, mesh=mesh, mp_policy=_policy(options))
    for block in blocks:
        # The last block is needed first in the backward: freeing it in between would gather it twice in a row.
        shard(block, reshard_after_forward=options.reshard_after_forward and block is not blocks[-1])
    for end in ends:
        looks_up = all(isinstance(module, nn.Embedding) for module in end)
        shard(end, reshard_after_forward=looks_up)
        if looks_up:  # its backward needs no weight, which is gathered for a moment of the forward only
            end[0].set_unshard_in_backward(False)  # type: ignore[operator]
    shard(model, reshard_after_forward=False)


def is_sharded(mesh: DeviceMesh | None, options: BlockOptions) -> bool:
    """Whether FSDP2 shards a model over these data-parallel ranks."""
    return mesh is not None and (mesh.size() > 1 or options.mixed_precision is not None)


def computed_dtype(options: BlockOptions) -> torch.dtype | None:
    """Of a block's parameters in the forward; None: their own."""
    return _policy(options).param_dtype


def _policy(options: BlockOptions) -> MixedPrecisionPolicy:
    if isinstance(options.mixed_precision, MixedPrecisionPolicy):
        return options.mixed_precision
    if options.mixed_precision is None:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    # Inputs are not cast: rotary tables in bf16 would lose positions.
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
