"""Models of many blocks that are alike, counted by a few of them.

While a step runs, all blocks but the first and the last ones give and take the same bytes one after the other, in the
forward and in the backward, and issue the same collectives. So a step of a model with five is counted, and what the
fourth did is put in as often as blocks are missing. That it did what the third did is looked at, not believed. What
grows with the number of blocks elsewhere, such as the sum of all norms' gradients, is known from a step of a model with
six.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fabric_tp.measure.communication import CollectiveCounter
from fabric_tp.measure.memory import Kind, MemoryTracker
from fabric_tp.measure.operations import Operation, OperationRecorder

if TYPE_CHECKING:
    from litgpt import Config

FEW = 5
"""Blocks that are counted: a first and one whose parameters FSDP2 gathers early, two to compare, a last."""
COMPARED = (2, 3)


def with_few_layers(config: Config, blocks: Sequence[nn.Module], layers: int = FEW) -> Config | None:
    """The config of a model with so many of the blocks; None if they are not all alike, or not more."""
    first, *others = [_description(block) for block in blocks]
    if len(blocks) <= layers or any(other != first for other in others):
        return None
    few = copy.copy(config)
    few.n_layer = layers
    for field in fields(config):
        value = getattr(config, field.name, None)
        if isinstance(value, list) and len(value) == len(blocks):
            if any(each != value[0] for each in value):
                return None
            setattr(few, field.name, value[:layers])
    return few


def _description(block: nn.Module) -> tuple[Any, ...]:
    parameters = [(name, each.shape, each.dtype, each.requires_grad) for name, each in block.named_parameters()]
    plain = [
        {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        for module in block.modules()
    ]
    return str(block), parameters, [{**each, "block_idx": None} for each in plain]


class Blocks:
    """Marks in what is recorded where each block's forward begins, and where its backward does.

    Args:
        blocks: In the order of the forward.
        tracker: Records bytes.
        counter: Records collectives.
        recorder: Records operations.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        tracker: MemoryTracker,
        counter: CollectiveCounter,
        recorder: OperationRecorder,
    ) -> None:
        self._blocks, self._tracker, self._counter, self._recorder = blocks, tracker, counter, recorder
        self._forward: dict[int, _Place] = {}
        self._backward: dict[int, _Place] = {}
        self._hooks = [hook for index, block in enumerate(blocks) for hook in self._watch(index, block)]

    def _watch(self, index: int, block: nn.Module) -> tuple[Any, ...]:
        def enter(module: nn.Module, args: Any) -> None:
            self._forward.setdefault(index, self._now())

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._forward.setdefault(index + 1, self._now())
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(mark)

        def mark(grad: Tensor) -> None:
            self._backward.setdefault(index, self._now())

        return block.register_forward_pre_hook(enter), block.register_forward_hook(leave)

    def _now(self) -> _Place:
        return _Place(self._tracker.recorded, len(self._counter.collectives), len(self._recorder.events))

    def restart(self) -> None:
        self._forward.clear()
        self._backward.clear()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def repeat(self, times: int, always: dict[Kind, int]) -> bool:
        """Count the fourth block as often again.

        Args:
            times: How often.
            always: Bytes of each of them that live throughout.

        Returns:
            Whether it did what the third one did; otherwise nothing is changed.
        """
        every = range(len(self._blocks))
        if set(self._forward) != {*every, len(every)} or set(self._backward) != set(every):
            return False
        forward = [(self._forward[index], self._forward[index + 1]) for index in COMPARED]
        backward = [(self._backward[index], self._backward[index - 1]) for index in COMPARED]
        for one, other in (forward, backward):
            if self._bytes(*one) != self._bytes(*other) or self._collectives(*one) != self._collectives(*other):
                return False
            if self._operations(*one) != self._operations(*other):
                return False
        for start, end in (backward[1], forward[1]):  # what is inserted later comes earlier
            self._tracker.insert(end.change, self._tracker.record(start.change, end.change) * times)
            self._counter.collectives[end.collective : end.collective] = self._collectives(start, end) * times
            self._recorder.events[end.event : end.event] = self._recorder.events[start.event : end.event] * times
        self._tracker.insert_before({kind: size * times for kind, size in always.items()})
        return True

    def _bytes(self, start: _Place, end: _Place) -> list[tuple[Kind, int]]:
        return [(storage.kind, change) for storage, change in self._tracker.record(start.change, end.change)]

    def _collectives(self, start: _Place, end: _Place) -> list[Any]:
        return self._counter.collectives[start.collective : end.collective]

    def _operations(self, start: _Place, end: _Place) -> list[Operation]:
        return [each for each in self._recorder.events[start.event : end.event] if isinstance(each, Operation)]


class _Place(NamedTuple):
    """How much had been recorded."""

    change: int
    collective: int
    event: int
