"""Initial parameters that depend on the seed and on nothing else: not on the mesh, not on what other ranks do."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fabric_tp.plan import tie, tied_parameters
from fabric_tp.seeds import mix
from fabric_tp.shards import copy_shard
from fabric_tp.styles.fused_colwise import FusedModule


def initialize(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give every parameter and buffer on the meta device memory and its initial value.

    Each module's own ``reset_parameters()`` runs on its parameters in full size, one module at a time, with a random
    state made from the seed and the module's name; each rank keeps its shard. So the values are bitwise the same on
    every mesh, and no rank ever holds more than one whole module.

    Raises:
        ValueError: A module with parameters or buffers on the meta device has no ``reset_parameters()``.
    """
    pending = list(_pending(model))
    if not pending:
        return
    for name, module, _ in pending:
        if not callable(getattr(module, "reset_parameters", None)):
            raise ValueError(
                f"{name or 'The model'} ({type(module).__name__}) is on the meta device and has no reset_parameters()"
                " to initialise it. Give it one, or create the model on a real device."
            )
    tied = tied_parameters(model)
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    tie(model, tied)
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), torch.no_grad():
        for name, module, wanted in pending:
            torch.manual_seed(mix(seed, name))
            _reset(module, wanted, device)


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


def _pending(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, list[tuple[nn.Module, str]]]]]:
    """Modules with something on the meta device, and where each of their parameters, by its own name, is now."""
    parts: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in parts:
            continue
        stored = {own: [(module, own)] for own, parameter in module._parameters.items() if parameter is not None}
        if isinstance(module, FusedModule):
            holders = [module.get_submodule(part.rpartition(".")[0]) for part in module.part_names("")]
            parts.update(holders)
            stored |= {own: [(holder, own) for holder in holders] for own in module.fused_names()}
        wanted = {own: places for own, places in stored.items() if any(m.get_parameter(n).is_meta for m, n in places)}
        if wanted or any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            yield name, module, wanted


def _reset(module: nn.Module, wanted: dict[str, list[tuple[nn.Module, str]]], device: torch.device) -> None:
    stored = {name: [owner.get_parameter(own) for owner, own in places] for name, places in wanted.items()}
    held = dict(module._parameters)
    try:
        for name, parts in stored.items():
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:]) if parts[0].dim() else ()
            module._parameters[name] = nn.Parameter(torch.empty(shape, dtype=parts[0].dtype, device=device))
        module.reset_parameters()  # type: ignore[operator]
        for name, parts in stored.items():
            whole = module.get_parameter(name).detach()
            rows = [part.shape[0] for part in parts]
            for part, values in zip(parts, whole.split(rows) if len(parts) > 1 else [whole], strict=True):
                copy_shard(part, values)
    finally:
        module._parameters.clear()
        module._parameters.update(held)
