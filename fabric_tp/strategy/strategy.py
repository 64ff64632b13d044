"""``ModelParallelStrategy`` with its sharp edges taken off: what a ``parallelize_fn`` alone cannot reach."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins import Precision
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fabric_tp import random
from fabric_tp.checkpoint import litgpt
from fabric_tp.checkpoint.atomic import keep_last, replacing, restore
from fabric_tp.data import Inputs
from fabric_tp.parallelize import ParallelizeByPlan, auto
from fabric_tp.strategy import failure
from fabric_tp.strategy.accumulation import GradientSync
from fabric_tp.strategy.background import Writer
from fabric_tp.strategy.checkpoints import check_for_unexpected_keys, check_saving, model_of
from fabric_tp.strategy.clip import clip_grad_norm, clip_grad_value
from fabric_tp.strategy.launching import resolve_sizes
from fabric_tp.strategy.optimizer import local
from fabric_tp.strategy.parameters import names_of_parameters, repoint
from fabric_tp.strategy.precision import ShardedMixedPrecision, without_copies

OWN_STATE = "fabric_tp"
"""The key of what the strategy itself keeps in a checkpoint."""


class TensorParallelStrategy(ModelParallelStrategy):
    """Tensor parallelism with FSDP2: a drop-in for Fabric's ``ModelParallelStrategy``.

    ``Fabric(strategy="tensor_parallel")`` is this strategy with its defaults.

    Args:
        parallelize_fn: One of this package's factories, or a function ``(model, device_mesh) -> model``. By default
            the architecture is recognised (:func:`fabric_tp.auto`).
        data_parallel_size: Groups of ranks that split the batch and, by FSDP2, the parameters. ``"auto"``: what
            ``tensor_parallel_size`` leaves, or the number of machines.
        tensor_parallel_size: Ranks that split each layer. ``"auto"``: what ``data_parallel_size`` leaves, or all
            processes of a machine.
        save_distributed_checkpoint: Each rank writes its shards into a directory; otherwise rank 0 writes one file.
        async_save: ``fabric.save`` returns as soon as each rank has copied its shards to memory of the CPU, where the
            copy stays for the next one, and they are written while the training goes on. The next ``fabric.save`` or
            ``fabric.load``, :meth:`wait_until_saved` and the end of the script wait for that; if it fails, these and
            the next optimizer step raise.
        keep_last: Of checkpoints whose paths differ in a number, such as ``step-00000100``, keep so many: each one
            saved takes the place of the oldest of those before it. By default all are kept.
        process_group_backend: As in ``ModelParallelStrategy``.
        timeout: As in ``ModelParallelStrategy``.
        verify_inputs: Compare the batches of the ranks of each tensor-parallel group, at the first and at every so
            many batches of a dataloader; 0 never does.
        broadcast_inputs: Only the first rank of each tensor-parallel group loads data and sends it to the others.
        fail_together: When a rank dies, the others end within seconds and say which it was, rather than wait for it.

    Raises:
        ValueError: ``async_save`` of one file, or ``keep_last`` below 1. From ``Fabric(...)``, before any process meets
            another: the sizes do not fit the processes.
        RuntimeError: From what comes after a checkpoint that could not be written, with the cause.

    Example::

        strategy = fabric_tp.TensorParallelStrategy(fabric_tp.litgpt(), data_parallel_size=2, tensor_parallel_size=4)
        fabric = L.Fabric(strategy=strategy, devices=8)
    """

    def __init__(
        self,
        parallelize_fn: Callable[[Any, Any], Any] | None = None,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        *,
        async_save: bool = False,
        keep_last: int | None = None,
        verify_inputs: int = 100,
        broadcast_inputs: bool = False,
        fail_together: bool = True,
    ) -> None:
        check_saving(async_save, save_distributed_checkpoint, keep_last)
        super().__init__(
            self._parallelize,
            data_parallel_size,
            tensor_parallel_size,
            save_distributed_checkpoint,
            process_group_backend,
            timeout,
        )
        self._function = parallelize_fn or auto()
        self._backward_sync_control = GradientSync()
        self._verify_inputs, self._broadcast_inputs = verify_inputs, broadcast_inputs
        self._inputs: Inputs | None = None
        self._fail_together = fail_together
        self._async_save, self._keep_last = async_save, keep_last
        self._writer: Writer | None = None

    # Processes

    def _configure_launcher(self) -> None:
        self._check_processes()
        nodes, processes = self.num_nodes, self.num_nodes * self.num_processes
        self._data_parallel_size, self._tensor_parallel_size = resolve_sizes(
            self._data_parallel_size, self._tensor_parallel_size, processes, nodes
        )
        if self._fail_together:
            failure.watch_parent()
        super()._configure_launcher()

    def _check_processes(self) -> None:
        """Compare what Fabric was told with the processes that a launcher has started."""
        environment = self.cluster_environment
        if environment is None or isinstance(environment, LightningEnvironment):
            return
        expected = self.num_nodes * self.num_processes
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.num_processes))
        if environment.world_size() != expected or here != self.num_processes:
            raise ValueError(
                f"Fabric(devices={self.num_processes}, num_nodes={self.num_nodes}) expects {expected} processes,"
                f" {self.num_processes} on each machine, but {type(environment).__name__} has started"
                f" {environment.world_size()}, {here} of them on this one. Give Fabric what was started, or let"
                " fabric_tp.launch(strategy) do it."
            )

    def setup_environment(self) -> None:
        super().setup_environment()
        if self._fail_together:
            failure.watch(self.global_rank, self.world_size)
        self._inputs = Inputs(
            self.device_mesh, verify_inputs=self._verify_inputs, broadcast_inputs=self._broadcast_inputs
        )
        self._inputs.check_seeds()

    def process_dataloader(self, dataloader: DataLoader) -> DataLoader:
        """See :class:`fabric_tp.data.Inputs`."""
        return self.inputs.setup(dataloader)  # type: ignore[return-value]

    @property
    def inputs(self) -> Inputs:
        assert self._inputs is not None, "before processes have met"
        return self._inputs

    # Model and optimizer

    @property
    def precision(self) -> Precision:
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        shards = isinstance(getattr(self, "_function", None), ParallelizeByPlan)
        self._precision = without_copies(precision, shards_parameters=shards)

    def _parallelize(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        function = self._function
        if isinstance(function, ParallelizeByPlan) and function.mixed_precision is None:
            mixed = isinstance(self.precision, ShardedMixedPrecision)
            function = dataclasses.replace(function, mixed_precision="bf16-mixed" if mixed else None)
        return function(module, device_mesh)

    def setup_module(self, module: nn.Module) -> nn.Module:
        self.inputs.check_seeds()
        module = super().setup_module(module)
        module.register_forward_pre_hook(self.inputs.before_forward, with_kwargs=True)
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.device != self.root_device:
                tensor.data = tensor.data.to(self.root_device)
        return module

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """On plain local shards where the optimizer allows it; see :func:`fabric_tp.optimizer.local`.

        Raises:
            RuntimeError: The last checkpoint could not be written.
        """
        if self._writer is not None:
            self._writer.raise_if_failed()
        with local(optimizer):
            return super().optimizer_step(optimizer, **kwargs)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Parallelize the model and point the optimizers at its new parameters, in the same groups."""
        named = [names_of_parameters(module, optimizer) for optimizer in optimizers]
        module = self.setup_module(module)
        for optimizer, names in zip(optimizers, named, strict=True):
            repoint(module, optimizer, names)
        return module, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip the norm of all gradients together, plain tensors and DTensors of any mesh, with one all-reduce."""
        self.precision.unscale_gradients(optimizer)
        return clip_grad_norm(
            self.precision.main_params(optimizer),
            self.device_mesh,
            max_norm=max_norm,
            norm_type=norm_type,
            error_if_nonfinite=error_if_nonfinite,
            names={parameter: name for name, parameter in module.named_parameters()},
        )

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        self.precision.unscale_gradients(optimizer)
        clip_grad_value(self.precision.main_params(optimizer), clip_val)

    # Checkpoints

    def save_checkpoint(
        self,
        path: str | Path,
        state: dict[str, Any],
        storage_options: Any = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Save as ``ModelParallelStrategy`` does, and the random states; a crash leaves an older checkpoint whole.

        Raises:
            RuntimeError: The checkpoint before this one could not be written.
        """
        path = Path(self.broadcast(path))
        model = next((each for each in state.values() if isinstance(each, nn.Module)), None)
        if model is not None:
            state = {**state, OWN_STATE: {"random": random.get_state(model)}}
        if self._async_save and storage_options is None and filter is None:  # which the other way refuses
            if self._writer is None:
                self._writer = Writer(self._timeout, self._keep_last)
            self._writer.save(path, state)
            return
        with replacing(path, moves=self.is_global_zero, barrier=self.barrier) as unfinished:
            super().save_checkpoint(unfinished, state, storage_options, filter)
        if self._keep_last is not None and self.is_global_zero:
            keep_last(path, self._keep_last)

    def wait_until_saved(self) -> None:
        """Wait until the last checkpoint is written; with ``async_save`` it may not be when ``fabric.save`` returns.

        Raises:
            RuntimeError: It could not be written.
        """
        if self._writer is not None:
            self._writer.wait()

    def load_checkpoint(
        self,
        path: str | Path,
        state: nn.Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load as ``ModelParallelStrategy`` does, and restore all objects that have a ``load_state_dict()``.

        A single model is loaded from one file with the keys of the unparallelized model, as litgpt's is.

        Raises:
            ValueError: ``strict``, and the checkpoint has keys that the model has not; or there is no checkpoint.
        """
        self.wait_until_saved()
        path = Path(self.broadcast(path))
        if self.is_global_zero:
            restore(path)
        self.barrier()
        if not path.exists():
            raise ValueError(f"There is no checkpoint {str(path)!r}.")
        if isinstance(state, nn.Module) and strict:
            litgpt.load(state, path)
            return {}
        if not isinstance(state, dict):
            return super().load_checkpoint(path, state, strict, weights_only)
        if strict:
            check_for_unexpected_keys(path, state)
        remainder = super().load_checkpoint(path, loaded := dict(state), strict, weights_only)
        for key, value in loaded.items():
            if value is not state[key] and hasattr(state[key], "load_state_dict"):
                state[key].load_state_dict(value)
            else:
                state[key] = value
        own = remainder.pop(OWN_STATE, None)
        if own is not None:
            random.set_state(model_of(state)[1], own["random"])
        return remainder
