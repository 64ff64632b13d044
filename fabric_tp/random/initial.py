"""Initial parameters that depend on the seed and on nothing else: not on the mesh, not on what other ranks do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fabric_tp.plan import tie, tied_parameters
from fabric_tp.seeds import mix
from fabric_tp.shards import copy_shard, own_region
from fabric_tp.styles.fused_colwise import FusedModule
from fabric_tp.styles.quantized import QuantizedWeight


def initialize(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give every parameter and buffer on the meta device memory and its initial value.

    Each module's own ``reset_parameters()``, or what a model of Transformers has in its place, runs on its parameters
    in full size, one module at a time, with a random state made from the seed and the module's name; each rank keeps
    its shard. So the values are bitwise the same on every mesh, and no rank ever holds more than one whole module.

    Raises:
        ValueError: A module with parameters or buffers on the meta device has no ``reset_parameters()``, or has one
            that leaves something out.
    """
    pending = list(_pending(model))
    if not pending:
        return
    resets = {each.name: _reset_of(model, each.name, each.module) for each in pending}
    tied = tied_parameters(model)
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    tie(model, tied)
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), torch.no_grad():
        unset = []
        for each in pending:
            torch.manual_seed(mix(seed, each.name))
            unset += _reset(each, device, resets[each.name])
    if unset:
        names = ", ".join([*unset[:3], *["..."][: len(unset[3:])]])
        warnings.warn(
            f"Nothing initialises {names}: nan until a checkpoint is loaded. To train from the start, create the model"
            " on a real device.",
            stacklevel=2,
        )


class _Pending(NamedTuple):
    """A module with something on the meta device."""

    name: str
    module: nn.Module
    parameters: dict[str, list[tuple[nn.Module, str]]]
    """Where each of its parameters, by its own name, is now."""
    buffers: list[str]


def _reset_of(model: nn.Module, name: str, module: nn.Module) -> Callable[[], object]:
    """What gives a module its initial values: of Transformers' models, ``_init_weights`` of the innermost around it.

    What that leaves out, such as a convolution, has torch's.
    """
    own = getattr(module, "reset_parameters", None)
    parts = name.split(".") if name else []
    for length in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:length]))
        init_weights = getattr(around, "_init_weights", None)
        if callable(init_weights) and hasattr(around, "base_model_prefix"):
            return partial(_initialize, module, init_weights, own)
    if not callable(own):
        raise ValueError(
            f"{name or 'The model'} ({type(module).__name__}) is on the meta device and has no reset_parameters()"
            " to initialise it. Give it one, or create the model on a real device."
        )
    return own


def _initialize(module: nn.Module, init_weights: Callable[[nn.Module], object], own: object) -> None:
    init_weights(module)
    if callable(own) and any(_is_unset(parameter) for parameter in module.parameters(recurse=False)):
        own()
        init_weights(module)


def shared_seed(mesh: DeviceMesh) -> int:
    """The seed of rank 0's random state (``fabric.seed_everything``), on all ranks of the mesh."""
    seed = torch.tensor(torch.initial_seed() % 2**63, dtype=torch.int64, device=mesh.device_type)
    broadcast(seed, mesh)
    return int(seed)


def broadcast(tensor: Tensor, mesh: DeviceMesh) -> None:
    """Overwrite ``tensor`` with that of the first rank of the mesh, on all its ranks."""
    for dim in reversed(range(mesh.ndim)):
        if mesh.size(dim) > 1:
            dist.broadcast(tensor, group=mesh.get_group(dim), group_src=0)


def _pending(model: nn.Module) -> Iterator[_Pending]:
    parts: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in parts:
            continue
        stored = {own: [(module, own)] for own in (*module._parameters, "weight") if _held(module, own) is not None}
        if isinstance(module, FusedModule):
            holders = [module.get_submodule(part.rpartition(".")[0]) for part in module.part_names("")]
            parts.update(holders)
            stored |= {own: [(holder, own) for holder in holders] for own in module.fused_names()}
        wanted = {own: places for own, places in stored.items() if any(_held(m, n).is_meta for m, n in places)}
        buffers = [own for own, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if wanted or buffers:
            yield _Pending(name, module, wanted, buffers)


def _reset(pending: _Pending, device: torch.device, reset: Callable[[], object]) -> list[str]:
    """Returns the names of parameters that have no value after it."""
    module = pending.module
    stored = {name: [_held(owner, own) for owner, own in at] for name, at in pending.parameters.items()}
    dims = {name: _dim(module, name) if len(parts) > 1 else 0 for name, parts in stored.items()}
    held, quantized = dict(module._parameters), _held(module, "weight")
    try:
        if isinstance(quantized, QuantizedWeight):
            del module.weight
        for name, parts in stored.items():
            shape = list(parts[0].shape)
            if len(parts) > 1:
                shape[dims[name]] = sum(part.shape[dims[name]] for part in parts)
            module._parameters[name] = nn.Parameter(_unset(torch.empty(shape, dtype=parts[0].dtype, device=device)))
        for name in pending.buffers:
            _unset(module.get_buffer(name))
        reset()
        for name in pending.buffers:
            if _is_unset(module.get_buffer(name)):
                raise ValueError(
                    f"{name} of {pending.name} is on the meta device, and what initialises a {type(module).__name__}"
                    " leaves it out. Create the model on a real device."
                )
        for name, parts in stored.items():
            whole, dim = module.get_parameter(name).detach(), dims[name]
            wholes = whole.split([part.shape[dim] for part in parts], dim) if len(parts) > 1 else [whole]
            for part, values in zip(parts, wholes, strict=True):
                if isinstance(part, QuantizedWeight):
                    part.store(values[own_region(part.like)])
                else:
                    copy_shard(part, values)
        return [f"{pending.name}.{name}" for name in stored if _is_unset(module.get_parameter(name))]
    finally:
        module._parameters.clear()
        module._parameters.update(held)
        if isinstance(quantized, QuantizedWeight):
            module.weight = quantized  # type: ignore[assignment]


def _held(module: nn.Module, name: str) -> Any:
    """The module's own parameter of this name, or the quantized weight in its place; None if it has none."""
    attribute = module.__dict__.get(name)
    return attribute if isinstance(attribute, QuantizedWeight) else module._parameters.get(name)


def _dim(module: nn.Module, name: str) -> int:
    return module.parallelized.style.fused_dim(module, name)  # type: ignore[union-attr, operator]


def _unset(tensor: Tensor) -> Tensor:
    """With a value that nothing is initialised to."""
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor if tensor.dtype == torch.bool or tensor.is_complex() else tensor.fill_(torch.iinfo(tensor.dtype).min)


def _is_unset(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        return bool(tensor.detach().sum().isnan())
    if tensor.dtype == torch.bool or tensor.is_complex():
        return False
    return bool((tensor == torch.iinfo(tensor.dtype).min).any())
