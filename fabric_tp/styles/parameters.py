"""The parameters of a module that is to be parallelized: which it has, how they lie, and one of them as a DTensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp.architectures.linear import storage


def distribute_parameter(parameter: nn.Parameter, placement: Placement, mesh: DeviceMesh) -> nn.Parameter:
    """This rank's part of ``parameter`` as a DTensor; it shares no memory with the whole, which can be freed."""
    local: Tensor = parameter.detach()
    if isinstance(placement, Shard):
        dim, length = placement.dim, local.shape[placement.dim]
        step = -(-length // mesh.size())
        first, end = (min(rank * step, length) for rank in (mesh.get_local_rank(), mesh.get_local_rank() + 1))
        local = local.narrow(dim, first, end - first)
    if not local.is_meta:
        local = local.to(mesh.device_type)
    if local.untyped_storage().nbytes() != local.numel() * local.element_size() or not local.is_contiguous():
        local = local.clone(memory_format=torch.contiguous_format)
    shape = parameter.shape
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(local, mesh, [placement], run_check=False, shape=shape, stride=stride)
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def check_linear(style: str, module: nn.Module) -> None:
    """Raise ValueError for a module whose forward is not known to be that of a linear layer."""
    if storage(module) is None:
        raise ValueError(f"{style} takes a torch.nn.Linear, and this is a {type(module).__name__}.")


def output_dim(module: nn.Module) -> int:
    """The dimension of a linear layer's weight that its output features lie along."""
    this = getattr(module, "parallelized", None)
    return 1 if (this.storage if this else storage(module)) == "inputs_first" else 0


def own_parameters(module: nn.Module) -> Iterator[str]:
    """Names of the parameters that the module holds itself."""
    return (name for name, parameter in module._parameters.items() if parameter is not None)
