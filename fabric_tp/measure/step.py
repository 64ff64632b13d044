"""One rank's step counted: on real ranks, or on those of ``fabric_tp.mesh.fake_mesh``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from fabric_tp.measure.communication import Collective, CollectiveCounter
from fabric_tp.measure.layers import COMPARED, Blocks
from fabric_tp.measure.memory import Kind, Memory, MemoryTracker
from fabric_tp.measure.operations import Event, OperationRecorder
from fabric_tp.strategy.optimizer import local
from fabric_tp.styles.quantized import quantized_weights


@dataclass(frozen=True)
class CountedStep:
    """A counted step of one rank."""

    memory: Memory
    collectives: tuple[Collective, ...]
    events: tuple[Event, ...]
    """What is computed and where collectives are waited for, in order; for :func:`fabric_tp.measure.schedule`."""

    def sent(self, axis: str | None = None) -> int:
        """Bytes that the rank sends over one dimension of the mesh, or over all."""
        return sum(collective.sent for collective in self.collectives if axis in (None, collective.axis))


def count_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    compute_output: Callable[[], Any],
    compute_loss: Callable[[Any], Tensor],
    *,
    mesh: DeviceMesh,
    batch: Iterable[Tensor] = (),
    lm_head: nn.Module | None = None,
    max_norm: float = 1.0,
    update: Callable[[], object] | None = None,
    warm_up: bool = True,
    blocks: Sequence[nn.Module] = (),
    missing: int = 0,
) -> CountedStep:
    """Count memory, collectives and operations of one rank in the second of two training steps.

    Args:
        model: With its parameters where they will be; it is trained.
        optimizer: Of the model's parameters.
        compute_output: The forward, up to what ``compute_loss`` takes.
        compute_loss: From the output to the loss.
        mesh: Whose dimensions the collectives are told apart by.
        batch: Tensors that live throughout, and count among the buffers.
        lm_head: The module that makes the logits, if there is one: what it makes counts among them.
        max_norm: For the clipping of gradients.
        update: Instead of ``optimizer.step()`` on local shards.
        warm_up: ``False``: the first step has no forward and backward, and gradients of zero. On fake tensors it must
            be ``True`` if forward and backward run operations on DTensors, which find out shapes on their first run.
        blocks: Of the model, if some are missing.
        missing: How many more of them the model has in truth, that are all alike.

    Raises:
        NotAlike: Blocks did not do the same.
    """
    with (
        CollectiveCounter(mesh) as counter,
        MemoryTracker() as tracker,
        OperationRecorder(counter, tracker) as recorder,
    ):
        tracker.mark("buffers", [*model.buffers(), *batch])
        tracker.mark("parameters", model.parameters())
        tracker.mark("parameters", (each for weight in quantized_weights(model).values() for each in weight.tensors()))
        watch = _Phases(tracker, counter)
        counted = Blocks(blocks, tracker, counter, recorder)
        hooks = [lm_head.register_forward_pre_hook(watch.enter_lm_head)] if lm_head is not None else []
        for whole in (warm_up, True):
            tracker.restart()
            counter.collectives.clear()
            recorder.restart()
            counted.restart()
            if whole:
                _forward_and_backward(compute_output, compute_loss, watch)
            else:
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            tracker.mark("gradients", (parameter.grad for parameter in model.parameters()))
            _clip_and_update(model, optimizer, max_norm, update, watch)
            tracker.mark("optimizer state", _tensors(optimizer.state.values()))
            optimizer.zero_grad()
        for hook in hooks:
            hook.remove()
        counted.remove()
        recorder.finish()
        if missing and not counted.repeat(missing, _always(blocks[COMPARED[1]], optimizer)):
            raise NotAlike
        return CountedStep(tracker.memory(), tuple(counter.collectives), tuple(recorder.events))


class NotAlike(Exception):
    """Blocks of a model did not do the same."""


def _always(block: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Kind, int]:
    """Bytes of a block that live throughout a step."""
    parameters: list[Any] = list(block.parameters())
    states = _tensors(optimizer.state[parameter] for parameter in parameters if parameter in optimizer.state)
    quantized = (each for weight in quantized_weights(block).values() for each in weight.tensors())
    return {
        "parameters": sum(map(_stored, (*parameters, *quantized))),
        "optimizer state": sum(map(_stored, states)),
        "buffers": sum(map(_stored, block.buffers())),
    }


def _stored(tensor: Tensor) -> int:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().nbytes()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _forward_and_backward(
    compute_output: Callable[[], Any], compute_loss: Callable[[Any], Tensor], watch: _Phases
) -> None:
    watch.enter("forward")
    output = compute_output()
    watch.enter_loss(output)
    loss = compute_loss(output)
    del output
    watch.enter("backward")
    loss.backward()
    watch.leave_lm_head()


def _clip_and_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    update: Callable[[], object] | None,
    watch: _Phases,
) -> None:
    watch.enter("clipping")
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    watch.enter("optimizer")
    if update is not None:
        update()
        return
    with local(optimizer):
        optimizer.step()


class _Phases:
    """Tells tracker and counter what is running."""

    def __init__(self, tracker: MemoryTracker, counter: CollectiveCounter) -> None:
        self._tracker, self._counter = tracker, counter
        self._in_lm_head = False

    def enter(self, name: str) -> None:
        self._tracker.phase(name)
        self._counter.phase = name

    def enter_lm_head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.enter("head and loss")
        self._tracker.mark_live("activations")
        self._tracker.made, self._in_lm_head = "logits and loss", True
        if args[0].requires_grad:
            args[0].register_hook(self.leave_lm_head)

    def enter_loss(self, output: Any) -> None:
        """If the model has no head, then its output is what the loss starts with."""
        if not self._in_lm_head:
            self._tracker.mark("logits and loss", [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
            self.enter_lm_head(nn.Identity(), tuple(tree_leaves(output)))

    def leave_lm_head(self, grad: Tensor | None = None) -> None:
        self._tracker.made, self._in_lm_head = "temporaries", False


def _tensors(states: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    return (value for state in states for value in state.values() if isinstance(value, Tensor))
