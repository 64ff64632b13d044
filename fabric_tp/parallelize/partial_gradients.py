"""The sum, over the tensor-parallel ranks, of gradients of which each rank has computed a part."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._pytree import tree_leaves

from fabric_tp import _torch
from fabric_tp.styles.style import LocalModule

STAND_IN = "only_answers_to_gradient_sync"
"""Attribute of an ``FSDPModule`` that FSDP2 knows nothing of."""


class PartialGradients:
    """Sums the partial gradients of replicated parameters in one all-reduce at the end of a backward.

    Until then such a gradient is a DTensor ``Partial``, and afterwards ``Replicate``. Where FSDP2 reduces gradients
    over the data-parallel ranks first, it is the reduced shards that are summed; both sums commute, and FSDP2 would
    otherwise issue one all-reduce for each parameter.

    A backward without gradient synchronisation (``fabric.no_backward_sync``, or FSDP2's
    ``set_requires_gradient_sync(False)``) sums nothing: the parts accumulate, and the next backward with it sums all.
    If every backward synchronises, each sums only what it added.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self.enabled = True
        self._group = mesh.get_group()
        self._owners = list(_partial_parameters(model))
        self._under_fsdp = isinstance(model, FSDPModule)
        self._backward = -1
        self._summed: dict[nn.Parameter, Tensor] = {}
        self._sharded: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self._parameters()
        if not self._owners:
            return
        if self._under_fsdp:
            for module, _ in self._owners:
                module.parallelized.defer_sum()  # type: ignore[union-attr, operator]
        else:
            _answer_to_gradient_sync(model, self)
        model.register_forward_hook(self._watch)

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._before_backward)

    def _before_backward(self, grad: Tensor) -> None:
        if self._backward == _torch.current_backward():
            return
        self._backward = _torch.current_backward()
        self._summed = {}  # left over from a backward that failed, whose gradients are no good to anybody
        for parameter in self._parameters():
            if parameter.grad is not None and self._is_summed(parameter.grad):
                self._summed[parameter] = parameter.grad
                parameter.grad = None
        _torch.after_backward(self._after_backward)

    @torch.no_grad()
    def _after_backward(self) -> None:
        summed, self._summed = self._summed, {}
        parts = [parameter for parameter in self._parameters() if parameter.grad is not None]
        if self.enabled or summed:
            self._sum(parts)
        for parameter, earlier in summed.items():
            parameter.grad = earlier if parameter.grad is None else parameter.grad.add_(earlier)

    def _sum(self, parameters: list[nn.Parameter]) -> None:
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter)  # type: ignore[union-attr]
        for same in by_dtype.values():
            locals_ = [_local(parameter) for parameter in same]
            bucket = torch.cat([local.reshape(-1) for local in locals_])
            dist.all_reduce(bucket, group=self._group)
            for parameter, part in zip(same, bucket.split([local.numel() for local in locals_]), strict=True):
                parameter.grad = _with_local(parameter, part.view(_local(parameter).shape))

    def _parameters(self) -> list[nn.Parameter]:
        """The parameters whose ``grad`` the optimizer will see: FSDP2 shows others while a module is gathered."""
        for owner in self._owners:
            parameter = owner[0].get_parameter(owner[1])
            if not self._under_fsdp or parameter.device_mesh.ndim > 1:  # type: ignore[attr-defined]
                self._sharded[owner] = parameter
        return list(self._sharded.values())

    def _is_summed(self, grad: Tensor) -> bool:
        return self._under_fsdp or (isinstance(grad, DTensor) and not grad.placements[0].is_partial())


def _partial_parameters(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (module, name)
        for module in model.modules()
        if isinstance(module, LocalModule)
        for name in sorted(module.parallelized.partial)
    ]


def _local(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    assert isinstance(grad, DTensor)
    return grad._local_tensor


def _with_local(parameter: nn.Parameter, local: Tensor) -> Tensor:
    grad = parameter.grad
    assert isinstance(grad, DTensor)
    placements = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
    return _torch.with_layout(local, _torch.local_and_layout(grad)[1], tuple(placements))


def _answer_to_gradient_sync(model: nn.Module, sums: PartialGradients) -> None:
    """Make a model without FSDP2 answer ``set_requires_gradient_sync`` as one with FSDP2 does.

    It is FSDP2's public way to say "this backward is not the last one before the step", and Fabric's
    ``no_backward_sync`` looks for an ``FSDPModule`` to call it on.
    """

    def set_requires_gradient_sync(self: nn.Module, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        sums.enabled = requires_gradient_sync

    cls = type(model)
    body = {"set_requires_gradient_sync": set_requires_gradient_sync, "__module__": cls.__module__, STAND_IN: True}
    model.__class__ = type(cls.__name__, (FSDPModule, cls), body)


def gathered_by_fsdp(model: nn.Module) -> list[FSDPModule]:
    """The modules whose parameters FSDP2 gathers for each forward."""
    return [module for module in model.modules() if isinstance(module, FSDPModule) and not hasattr(module, STAND_IN)]
