"""What one rank computes in a step, and where it issues collectives and waits for them: in order, without times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fabric_tp._torch import OperationMode
from fabric_tp.measure.communication import Collective, CollectiveCounter
from fabric_tp.measure.memory import MemoryTracker
from fabric_tp.mesh import DATA_PARALLEL

Work = Literal["products", "attention", "other operations"]
"""Matrix products; fused attention kernels; the rest, which reads and writes memory and computes little."""


@dataclass(frozen=True)
class Operation:
    """Something that the device computes."""

    work: Work
    phase: str
    dtype: torch.dtype
    """That it computes in."""
    flops: int
    """As torch counts them; causal attention too has those of all pairs of tokens."""
    executed: int
    """Of these, what a kernel computes: half of causal attention."""
    nbytes: int
    """That it reads and writes."""
    fused: int
    """The same if the operations around it, up to the next product or collective, are one kernel with it."""
    starts_kernel: bool
    """Whether it is the first of these."""

    def extended(self, other: Event, times: int) -> Operation:
        """With what ``other`` has more, so often.

        Raises:
            ValueError: ``other`` is not the same operation on more.
        """
        sizes = ("flops", "executed", "nbytes", "fused")
        if not isinstance(other, Operation) or replace(other, **{name: getattr(self, name) for name in sizes}) != self:
            raise ValueError(f"{other} is not {self} on more.")
        grown = {name: getattr(self, name) + times * (getattr(other, name) - getattr(self, name)) for name in sizes}
        return replace(self, **grown)


@dataclass(frozen=True)
class Issue:
    """A collective is issued."""

    collective: Collective
    number: int | None
    """By which it is waited for; None for FSDP2's, which are waited for in the order in which they were issued."""

    def extended(self, other: Event, times: int) -> Issue:
        """As :meth:`Operation.extended`."""
        if not isinstance(other, Issue):
            raise ValueError(f"{other} is not {self} on more.")
        return replace(self, collective=self.collective.extended(other.collective, times))


@dataclass(frozen=True)
class Wait:
    """What is computed from here on needs a collective's result.

    With a ``number`` that of :class:`Issue`; otherwise the oldest of FSDP2's gathers, or all of its reductions.
    """

    number: int | None = None
    kind: Literal["all-gather", "reduce-scatter"] | None = None

    def extended(self, other: Event, times: int) -> Wait:
        """As :meth:`Operation.extended`."""
        if not isinstance(other, Wait):
            raise ValueError(f"{other} is not {self} on more.")
        return self


Event = Operation | Issue | Wait


def record(step: Callable[[], object]) -> list[Event]:
    """What a function computes in this process."""
    counter, tracker = CollectiveCounter(), MemoryTracker()
    with counter, tracker, OperationRecorder(counter, tracker) as recorder:
        step()
    recorder.finish()
    return recorder.events


def extended(few: Sequence[Event], more: Sequence[Event], times: int) -> tuple[Event, ...]:
    """``few`` with what ``more`` has more, so often: larger operations, and others in one place of the step.

    Raises:
        ValueError: They differ in more than this.
    """
    first = next((index for index, pair in enumerate(zip(few, more, strict=False)) if not _are_alike(*pair)), len(few))
    last = len(more) - (len(few) - first)
    pairs = zip(few, (*more[:first], *more[last:]), strict=True)
    events = [one if one == other else one.extended(other, times) for one, other in pairs]
    return (*events[:first], *(tuple(more[first:last]) * times), *events[first:])


def _are_alike(one: Event, other: Event) -> bool:
    if one == other:
        return True
    try:
        one.extended(other, 0)
    except ValueError:
        return False
    return True


_NO_KERNEL = (
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize_", "lift_fresh"),
    *("_unsafe_view", "unsqueeze_", "squeeze_", "t_", "detach_", "set_"),
)
_LOOK_UP = ("embedding", "index_select", "gather", "index")
_OVERWRITE = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")
_BESIDE = ("fsdp::all_gather_copy_in",)
"""Run on a stream of their own."""


class OperationRecorder(OperationMode):
    """Records what runs within this context; to be entered after the counter and the tracker, which it asks.

    Args:
        counter: Records the same step's collectives.
        tracker: Records its bytes.
    """

    def __init__(self, counter: CollectiveCounter, tracker: MemoryTracker) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._counter, self._tracker = counter, tracker
        self._numbers: dict[object, int] = {}
        self._traffic: dict[int, _Traffic] = {}

    def see(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        issued = len(self._counter.collectives)
        name = operation._schema.name
        if name == "fsdp::split_with_sizes_copy":
            self.events.append(Wait(kind="all-gather"))
        result = operation(*args, **kwargs)
        if name == "_c10d_functional::wait_tensor":
            self._wait(args[0])
        elif len(self._counter.collectives) > issued:
            self._issue(self._counter.collectives[-1], operation, args, kwargs, result)
        elif not operation.is_view and "c10d" not in operation.namespace and name not in _BESIDE:
            self._compute(operation, args, kwargs, result)
        return result

    def restart(self) -> None:
        self.events.clear()
        self._traffic.clear()

    def finish(self) -> None:
        """Find out what fused operations read and write, now that it is known what is read later."""
        last: dict[object, int] = {}
        for index, traffic in self._traffic.items():
            for storage, _ in traffic.reads:
                last[storage] = index
        group: list[int] = []
        for index in range(len(self.events) + 1):
            event = self.events[index] if index < len(self.events) else None
            if isinstance(event, Operation) and event.work == "other operations" and self._traffic[index].fusible:
                group.append(index)
            elif group:
                self._fuse(group, last)
                group = []

    def _fuse(self, group: list[int], last: dict[object, int]) -> None:
        seen: set[object] = set()
        for index in group:
            event, traffic = self.events[index], self._traffic[index]
            assert isinstance(event, Operation)
            nbytes = sum(size for storage, size in traffic.reads if storage not in seen)
            nbytes += sum(size for storage, size in traffic.writes if last.get(storage, -1) > group[-1])
            seen |= {storage for storage, _ in (*traffic.reads, *traffic.writes)}
            self.events[index] = replace(event, fused=nbytes, starts_kernel=index == group[0])

    def _issue(
        self, collective: Collective, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        functional = operation.namespace == "_c10d_functional"
        if functional or collective.axis != DATA_PARALLEL:
            number = len(self.events)
            self.events.append(Issue(collective, number))
            if functional or _argument(operation, args, kwargs, "async_op"):
                self._numbers.update((self._storage(each), number) for each in _tensors(result))
            else:
                self.events.append(Wait(number))
            return
        if collective.kind == "reduce-scatter":  # FSDP2 keeps what it reduces until the next one
            self.events.append(Wait(kind="reduce-scatter"))
        self.events.append(Issue(collective, None))

    def _wait(self, x: Tensor) -> None:
        number = self._numbers.get(self._storage(x))
        if number is not None:
            self.events.append(Wait(number))

    def _compute(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = operation._schema.name.partition("::")[2]
        if name in _NO_KERNEL:
            return
        written = [*_tensors(result), *_mutated(operation, args, kwargs)]
        read = list(_tensors((args, {key: each for key, each in kwargs.items() if key != "out"})))
        if name in _OVERWRITE:
            read = [each for each in read if not any(each is other for other in written)]
        most = sum(map(_nbytes, written)) if name in _LOOK_UP else None
        reads = self._traffic_of(read, most)
        writes = self._traffic_of(written)
        if not writes:
            return
        work, flops, executed = _flops(operation, name, args, kwargs, result)
        nbytes = sum(size for _, size in (*reads, *writes))
        dtype = written[0].dtype
        self._traffic[len(self.events)] = _Traffic(reads, writes, self._is_in_blocks())
        self.events.append(Operation(work, self._counter.phase, dtype, flops, executed, nbytes, nbytes, True))

    def _is_in_blocks(self) -> bool:
        return self._counter.phase in ("forward", "backward") and self._tracker.made != "logits and loss"

    def _traffic_of(self, tensors: list[Tensor], most: int | None = None) -> list[tuple[object, int]]:
        sizes: dict[object, int] = {}
        for tensor in tensors:
            storage = self._storage(tensor)
            whole = tensor.untyped_storage().nbytes()
            size = min(_nbytes(tensor), whole, whole if most is None else most)
            sizes[storage] = max(sizes.get(storage, 0), size)
        return list(sizes.items())

    def _storage(self, tensor: Tensor) -> object:
        return self._tracker.storage(tensor)


@dataclass(frozen=True)
class _Traffic:
    """The storages that an operation reads and writes, with bytes."""

    reads: list[tuple[object, int]]
    writes: list[tuple[object, int]]
    fusible: bool


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _mutated(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for index, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[index] if index < len(args) else kwargs.get(argument.name))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(
    operation: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> tuple[Work, int, int]:
    if name.startswith("_scaled_dot_product"):
        backward = "backward" in name
        q, k, v = args[1:4] if backward else args[:3]
        pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        flops = 2 * pairs * (q.shape[3] + v.shape[3])
        if backward:  # the scores again, and a product for each of the gradients of q, k, v and the weights
            flops = 2 * pairs * (3 * q.shape[3] + 2 * v.shape[3])
        causal = _is_causal(operation, args, kwargs)
        return "attention", flops, flops // 2 if causal else flops
    formula = flop_registry.get(operation._overloadpacket)
    if formula is None:
        return "other operations", 0, 0
    flops = int(formula(*args, **kwargs, out_val=result))
    return "products", flops, flops


def _is_causal(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(_argument(operation, args, kwargs, "is_causal"))


def _argument(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    for index, argument in enumerate(operation._schema.arguments):
        if argument.name == name:
            return args[index] if index < len(args) else kwargs.get(name, argument.default_value)
    return None
