"""Optimizers on local shards: no DTensor operation, and no temporary of the size of the parameters.

While ``optimizer.step()`` runs, the optimizer's parameters, gradients and state are exchanged for plain tensors that
share their memory; hooks, schedulers, closures and checkpoints see the DTensors they always see.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fabric_tp import _torch

ELEMENTWISE: tuple[type[Optimizer], ...] = (
    optim.Adadelta,
    optim.Adagrad,
    optim.Adam,
    optim.Adamax,
    optim.AdamW,
    optim.ASGD,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Rprop,
    optim.SGD,
)
"""Each element's update depends on that element alone, so that a shard can be updated by itself."""

FUSED: tuple[type[Optimizer], ...] = (optim.Adam, optim.AdamW, optim.SGD)
"""Those with a kernel that updates in place, without temporaries, on the CPU and on GPUs."""

PIECE = 64 * 2**20
"""Bytes of parameters that are updated at once where there is no such kernel: enough to keep a GPU busy."""

SCALARS = ("step", "eta", "mu", "mu_product")
"""State of which there is one number for each parameter; any other state has the parameter's shape."""


@contextmanager
def local(optimizer: Optimizer) -> Iterator[None]:
    """Within this context ``optimizer.step()`` runs on this rank's shards.

    The results are those of the same optimizer on DTensors. Where the user chose neither ``foreach`` nor ``fused``,
    Adam, AdamW and SGD use torch's fused kernel, which needs no temporaries; it may differ from the default in the
    last bits. A choice is kept. All else is updated in pieces of
    :data:`PIECE` bytes, or one parameter if that is larger, so temporaries are at most a few times that. Groups may mix
    plain tensors and DTensors, also of different meshes.

    An optimizer that is none of :data:`ELEMENTWISE`, or a subclass of one, is left alone, since its update may need
    whole tensors (Adafactor, Muon, LBFGS): it runs on DTensors as it would without. So do ``differentiable=True`` and
    parameters that FSDP2 offloads.

    Example::

        with fabric_tp.optimizer.local(optimizer):
            optimizer.step()

    Args:
        optimizer: Any ``torch.optim.Optimizer``, or what ``fabric.setup_optimizers`` made of it.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if type(optimizer) not in ELEMENTWISE or not all(_is_local(group) for group in optimizer.param_groups):
        yield
        return
    exchange = _Exchange(optimizer)
    # Innermost of all hooks, so that the user's see DTensors.
    before = optimizer.register_step_pre_hook(exchange.before_step)
    after = _torch.register_first_step_post_hook(optimizer, exchange.after_step)
    try:
        yield
    finally:
        before.remove()
        after.remove()
        exchange.undo()


class _Exchange:
    """Local tensors in the place of an optimizer's DTensors, and back."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._kept: tuple[list[dict[str, Any]], defaultdict[Tensor, Any]] | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []  # parameter, local tensor

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.make()
            return None

        def closure_on_dtensors() -> Any:  # it computes gradients; all these optimizers call it first, and once
            loss = closure()
            self.make()
            return loss

        return args[:1], {**kwargs, "closure": closure_on_dtensors}

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.undo()

    @torch.no_grad()
    def make(self) -> None:
        self.undo()  # of a step that raised
        groups, state = self._optimizer.param_groups, self._optimizer.state
        pairs: list[tuple[Tensor, Tensor]] = []
        local_state: defaultdict[Tensor, Any] = defaultdict(dict)
        local_groups: list[dict[str, Any]] = []
        for group in groups:
            shards = []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shards.append(_shard(parameter))
                    pairs.append((parameter, shards[-1]))
                    if state.get(parameter):
                        local_state[shards[-1]] = {k: _local(v, parameter) for k, v in state[parameter].items()}
            local_groups += _split(type(self._optimizer), group, shards, local_state)
        self._kept, self._pairs = (groups, state), pairs
        self._optimizer.param_groups, self._optimizer.state = local_groups, local_state

    @torch.no_grad()
    def undo(self) -> None:
        if self._kept is None:
            return
        optimizer, local_state = self._optimizer, self._optimizer.state
        optimizer.param_groups, optimizer.state = self._kept
        for parameter, shard in self._pairs:
            if shard in local_state:
                state = optimizer.state[parameter]
                for key, value in local_state[shard].items():
                    state[key] = _global(key, value, state.get(key), parameter)
        # The memory changed behind the DTensors' backs; their version tells autograd so.
        torch.autograd.graph.increment_version([parameter for parameter, _ in self._pairs])
        self._kept, self._pairs = None, []


def _is_local(group: dict[str, Any]) -> bool:
    offloaded = any(isinstance(p, DTensor) and p.device.type != p.device_mesh.device_type for p in group["params"])
    return not offloaded and not group.get("differentiable")


def _shard(parameter: Tensor) -> Tensor:
    """A plain tensor over the local memory of ``parameter``, with the local gradient."""
    if not isinstance(parameter, DTensor):
        return parameter
    shard, gradient = parameter.to_local().detach(), parameter.grad
    assert gradient is not None
    gradient = _local(gradient, parameter)
    if gradient.dtype != shard.dtype:
        shard.grad_dtype = gradient.dtype  # type: ignore[attr-defined]
    shard.grad = gradient
    return shard


def _local(value: Any, parameter: Tensor) -> Any:
    """The local tensor of a gradient or state, split as the parameter is; a Partial gradient is summed."""
    if not isinstance(value, DTensor):
        return value
    if isinstance(parameter, DTensor) and value.ndim == parameter.ndim and value.placements != parameter.placements:
        value = value.redistribute(placements=parameter.placements)
    return value.to_local()


def _global(key: str, value: Any, known: Any, parameter: Tensor) -> Any:
    """What ``state[parameter][key]`` becomes when its local tensor is now ``value``."""
    if isinstance(known, DTensor) and known.to_local() is value:
        return known
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or key in SCALARS:
        return value
    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _split(
    kind: type[Optimizer], group: dict[str, Any], shards: list[Tensor], state: dict[Tensor, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Groups with the same options that need little temporary memory each."""
    fused: dict[bool, list[Tensor]] = {False: [], True: []}
    others: list[Tensor] = shards
    if kind in FUSED and group.get("foreach") is None and group.get("fused") is None:
        others = []
        for shard in shards:
            if not _is_fusable(kind, shard, state.get(shard, {})):
                others.append(shard)
                continue
            fused[shard in state].append(shard)  # torch's fused SGD takes momenta for all of a group or for none
            if "step" in state.get(shard, {}):
                state[shard]["step"] = state[shard]["step"].to(shard.device, torch.float32)
    for part in fused.values():
        if part:
            yield {**group, "params": part, "fused": True}
    if group.get("fused"):
        yield {**group, "params": others}
        return
    for piece in _pieces(others):
        yield {**group, "params": piece}


def _is_fusable(kind: type[Optimizer], shard: Tensor, state: dict[str, Any]) -> bool:
    """The fused kernels take all tensors for equally laid out, and do not check it."""
    if kind is optim.SGD and shard.device.type == "cpu" and shard.itemsize < 4:
        return False  # with momentum, torch 2.11 to 2.13 get this wrong in half precision, all but the last elements
    if shard.device.type not in ("cpu", "cuda") or not shard.is_floating_point() or not shard.numel():
        return False
    assert shard.grad is not None
    tensors = [shard, shard.grad, *(value for key, value in state.items() if key not in SCALARS)]
    return all(
        (type(tensor) in (Tensor, nn.Parameter) or _torch.is_fake(tensor))
        and (tensor.dtype, tensor.device, tensor.shape) == (shard.dtype, shard.device, shard.shape)
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        for tensor in tensors
    )


def _pieces(shards: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    piece: list[Tensor] = []
    size = 0
    for shard in shards:
        if piece and size + shard.nbytes > PIECE:
            yield piece
            piece, size = [], 0
        piece.append(shard)
        size += shard.nbytes
    if piece:
        yield piece
