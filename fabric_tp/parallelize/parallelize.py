"""From a model to a parallelized one: the order of the steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fabric_tp import _torch
from fabric_tp.mesh import DATA_PARALLEL, TENSOR_PARALLEL, device_of
from fabric_tp.parallelize.blocks import checkpoint_or_compile
from fabric_tp.parallelize.decoding import is_decoding, set_decoding_styles
from fabric_tp.parallelize.fsdp import computed_dtype, shard_over_data_parallel
from fabric_tp.parallelize.lean import make_lean
from fabric_tp.parallelize.options import BlockOptions
from fabric_tp.parallelize.overlapped import goes_through_in_halves, overlap_halves
from fabric_tp.parallelize.partial_gradients import PartialGradients
from fabric_tp.parallelize.verification import verified, verify_without_ranks
from fabric_tp.plan import Plan, apply_plan, check_plan
from fabric_tp.plan.table import table
from fabric_tp.random import broadcast, initialize, shared_seed
from fabric_tp.styles.quantized import check_quantization, quantize
from fabric_tp.styles.random_module import follow_run, has_followers

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Derived:
    """What is to be done to one model on so many ranks."""

    plan: Plan
    derived_from: str = ""
    """Description of the architecture from which the plan was derived; empty for a plan of the user's."""
    blocks: list[nn.Module] = field(default_factory=list)
    """What is checkpointed, compiled and sharded by FSDP2 one by one; empty for the model as a whole."""
    token_wise: list[nn.Module] = field(default_factory=list)
    """MLPs that are known to compute each token by itself."""
    samples_apart: bool = False
    """The model as a whole is known to compute each sample by itself."""
    ends: list[list[nn.Module]] = field(default_factory=list)
    """What comes before the blocks, and what after them."""
    lean: tuple[str, ...] = ()
    """Import paths of tables of lean modules."""
    refused: dict[str, str] = field(default_factory=dict)
    """Arguments with which the forward would be wrong, and why."""
    decoding: Plan | None = None
    """The plan by which tokens are generated, with parameters that are split in the same way; None for ``plan``."""
    verify: Literal["no", "try", "must"] = "no"
    """Whether to run the model before and after; "try": unless nobody knows with which arguments."""


@dataclass(frozen=True, kw_only=True)
class ParallelizeByPlan(BlockOptions):
    """Parallelizes a model over Fabric's ("data_parallel", "tensor_parallel") mesh by a plan that subclasses make."""

    def derive(self, model: nn.Module, tensor_parallel_size: int) -> Derived:
        """Find out, once, what is to be done to the model; unchecked.

        Raises:
            ValueError: The model is none that this can parallelize.
        """
        raise NotImplementedError

    def __call__(self, model: Model, device_mesh: DeviceMesh) -> Model:
        """Parallelize ``model`` in place: its parameters become DTensors on this rank's device, initialised if on meta.

        Raises:
            ValueError: See :meth:`check`.
        """
        mesh = _tensor_parallel(device_mesh)
        derived = self._checked(model, mesh.size())
        device = device_of(device_mesh)
        _synchronise(model, device_mesh, device)
        with _verified(model, derived, mesh):
            _divide(model, derived, mesh)
        if self.quantize:
            quantize(derived.blocks or [model], self.quantize, computed_dtype(self))
        replicas = _data_parallel(device_mesh)
        options = self
        if derived.samples_apart and goes_through_in_halves(self, replicas):
            overlap_halves(model, derived.token_wise)
            options = replace(self, overlap=False)
        checkpoint_or_compile(derived.blocks or [model], options, mesh, derived.token_wise)
        shard_over_data_parallel(model, derived.blocks, derived.ends, replicas, self)
        if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
            initialize(model, device, shared_seed(device_mesh))
        PartialGradients(model, mesh)
        if has_followers(model):
            follow_run(model, device_mesh, shared_seed(device_mesh))
        if derived.refused and mesh.size() > 1:
            refuse_arguments(model, derived.refused)
        if device_mesh.ndim > 1:
            _torch.flatten(device_mesh)
        return model

    def plan(self, model: nn.Module, *, tensor_parallel_size: int) -> Plan:
        """The style of each module, by name pattern; checked as in :meth:`check`."""
        return self._checked(model, tensor_parallel_size).plan

    def check(self, model: nn.Module, *, tensor_parallel_size: int) -> None:
        """Find out whether the model can be parallelized so, without processes or memory (a meta model will do).

        Raises:
            ValueError: The model is not of the architecture; a plan key matches nothing; a parameter is covered by no
                style; heads or widths cannot be divided, with what works; a model that is verified cannot run when it
                is divided, with the module and the line.
        """
        derived = self._checked(model, tensor_parallel_size)
        if derived.verify != "no" and tensor_parallel_size > 1:
            verify_without_ranks(model, derived.blocks, partial(_divide, derived=derived), tensor_parallel_size)

    def explain(self, model: nn.Module, *, tensor_parallel_size: int, data_parallel_size: int = 1) -> str:
        """A table of module, style, parameter shape whole and per rank, and collectives of forward and backward.

        Needs no process group; for a model on the meta device, no memory either.
        """
        plan = self.plan(model, tensor_parallel_size=tensor_parallel_size)
        sizes = {"tensor_parallel_size": tensor_parallel_size, "data_parallel_size": data_parallel_size}
        return table(plan, model, **sizes)

    def _checked(self, model: nn.Module, tensor_parallel_size: int) -> Derived:
        if tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size={tensor_parallel_size} must be at least 1.")
        derived = self.derive(model, tensor_parallel_size)
        check_plan(derived.plan, model, tensor_parallel_size, derived.derived_from)
        if self.quantize:
            check_quantization(derived.blocks or [model], self.quantize)
        return derived


def _divide(model: nn.Module, derived: Derived, mesh: DeviceMesh) -> None:
    make_lean(model, derived.lean)
    apply_plan(derived.plan, model, mesh)
    if derived.decoding is not None:
        set_decoding_styles(derived.decoding, model)


def _verified(model: nn.Module, derived: Derived, mesh: DeviceMesh) -> AbstractContextManager[None]:
    if derived.verify == "no" or mesh.size() == 1:
        return nullcontext()
    divide = partial(_divide, derived=derived, mesh=mesh)
    return verified(model, derived.blocks, divide, mesh, must=derived.verify == "must")


def refuse_arguments(model: nn.Module, refused: Mapping[str, str]) -> None:
    """Let the model's forward refuse these arguments, however they are given; with the reason.

    Not while it generates: sequences are whole then, and nothing has a gradient.
    """
    signature = inspect.signature(model.forward)

    def refuse(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = {**signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        for name, reason in refused.items():
            if given.get(name) and not is_decoding(module):
                raise ValueError(f"{name}={given[name]} {reason}")

    model.register_forward_pre_hook(refuse, with_kwargs=True)


def _tensor_parallel(mesh: DeviceMesh) -> DeviceMesh:
    names = mesh.mesh_dim_names or ()
    if TENSOR_PARALLEL not in names:
        raise ValueError(
            f"The device mesh has the dimensions {names or '(unnamed)'} and none called {TENSOR_PARALLEL!r}. Fabric's"
            " ModelParallelStrategy makes the right one; by hand:"
            f" init_device_mesh(device, (dp, tp), mesh_dim_names=({DATA_PARALLEL!r}, {TENSOR_PARALLEL!r}))."
        )
    return mesh if mesh.ndim == 1 else mesh[TENSOR_PARALLEL]


def _data_parallel(mesh: DeviceMesh) -> DeviceMesh | None:
    if DATA_PARALLEL not in (mesh.mesh_dim_names or ()):
        return None
    return mesh if mesh.ndim == 1 else mesh[DATA_PARALLEL]


def _synchronise(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Give all ranks the first rank's values, as data parallelism does: each is about to keep a part of its own copy.

    Parameters visit the device one by one; buffers stay there. In the order of their names: a module that makes its
    buffers from a set (Gemma 3's rotary tables) has them in another order in each process.
    """
    if mesh.size() > 1:
        for _, parameter in sorted(model.named_parameters()):
            if not parameter.is_meta:
                on_device = parameter.data.to(device)
                broadcast(on_device, mesh)
                parameter.data = on_device.to(parameter.device)
    for _, buffer in sorted(model.named_buffers()):
        if not buffer.is_meta:
            buffer.data = buffer.data.to(device)
            broadcast(buffer.data, mesh)
