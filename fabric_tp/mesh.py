"""Fabric's mesh: the names of its dimensions, and one that a single process plays, on tensors without memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import tree_leaves

from fabric_tp import _torch
from fabric_tp._torch import FakeTensor, FakeTensorMode, OperationMode, unset_fake_temporarily

DATA_PARALLEL, TENSOR_PARALLEL = "data_parallel", "tensor_parallel"


def device_of(mesh: DeviceMesh) -> torch.device:
    """This rank's device."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


@contextmanager
def fake_mesh(data_parallel_size: int, tensor_parallel_size: int, device_type: str = "cpu") -> Iterator[DeviceMesh]:
    """Fabric's mesh in this one process, as its rank 0, with collectives that go nowhere.

    Raises:
        ValueError: The process has a process group.
    """
    if dist.is_initialized():
        raise ValueError(
            "This process has a process group, and one rank of another mesh cannot be played beside it. Call it before"
            " Fabric launches, or run `fabric-tp estimate` in a process of its own."
        )
    excepthook = sys.excepthook
    dist.init_process_group("fake", rank=0, world_size=data_parallel_size * tensor_parallel_size)
    sys.excepthook = excepthook  # not one that says of which rank an error is
    try:
        shape = (data_parallel_size, tensor_parallel_size)
        yield init_device_mesh(device_type, shape, mesh_dim_names=(DATA_PARALLEL, TENSOR_PARALLEL))
    finally:
        dist.destroy_process_group()
        _torch.forget_meshes()


@contextmanager
def fake_tensors(experts: int = 1) -> Iterator[None]:
    """Within it tensors have a shape and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Values(experts):
        yield


class _Values(OperationMode):
    """Answers what depends on values, which fake tensors do not have, and leaves the mesh's own tensors real."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self._experts = experts

    def see(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(each, FakeTensor) for each in tensors):
            with unset_fake_temporarily():
                return operation(*args, **kwargs)
        if operation is torch.ops.aten._local_scalar_dense.default:
            return 0
        if operation is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as it is on a device; the rule for fake tensors makes another tensor
        if operation is torch.ops.aten.nonzero.default:
            mask = args[0]
            found = mask.numel() // (self._experts if mask.dim() > 1 else 1)
            return mask.new_empty((found, mask.dim()), dtype=torch.int64)
        return operation(*args, **kwargs)
