"""Bytes that live while a step runs: how many at the peak, and what they are for."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from fabric_tp._torch import FakeTensor, OperationMode

Kind = Literal[
    "parameters",
    "gradients",
    "optimizer state",
    "buffers",
    "activations",
    "logits and loss",
    "collective buffers",
    "temporaries",
]
"""What bytes are for.

``buffers``: of modules, and the batch. ``activations``: what the forward of everything before the head keeps for the
backward. ``logits and loss``: what is made from the head's forward to the gradient of its input. ``collective
buffers``: results of collectives and what FSDP2 gathers. ``temporaries``: the rest, such as what is computed again in
the backward.
"""
KINDS: tuple[Kind, ...] = get_args(Kind)

_COLLECTIVE_NAMESPACES = ("_c10d_functional", "c10d", "fsdp")


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    peak: int
    phase: str
    """What was running at the peak."""
    at_peak: dict[Kind, int]
    """The peak, by kind."""
    most: dict[Kind, int]
    """The most of each kind at any time; its sum may be more than the peak."""


@dataclass(eq=False)
class _Storage:
    nbytes: int
    kind: Kind
    final: bool = False
    """Its kind was said, and not guessed from when it was made."""
    reference: weakref.ref[torch.UntypedStorage] | None = None


Change = tuple[_Storage, int]
"""Bytes that a storage has more than before."""


class MemoryTracker(OperationMode):
    """Counts the bytes of all tensors that operations make within this context, each storage once.

    Works on real tensors and, entered within a ``FakeTensorMode``, on fake ones. Memory that an operation takes and
    gives back within itself is not seen. Tensors that are older than the tracker count once they are marked, or once an
    operation makes a view of them.

    A tensor's kind is often known only later: that it was kept for the backward when the forward has ended, that it is
    a gradient when the backward has. So changes are recorded, and added up when all kinds are known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: Kind = "temporaries"
        """What tensors that are made now are for, unless marked otherwise."""
        self._live: dict[int, _Storage] = {}
        self._changes: list[Change] = []
        self._phases: list[tuple[int, str]] = [(0, "")]
        self._first = 0
        self._gathered: dict[int, _Storage] = {}
        self._under_fake_mode = False

    def __enter__(self) -> MemoryTracker:
        self._under_fake_mode = _fake_mode_is_active()
        super().__enter__()
        return self

    def see(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = operation(*args, **kwargs)
        self._look_at_gathered()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, self.made)
        if operation.namespace in _COLLECTIVE_NAMESPACES:
            self._see_buffers(result, kwargs.get("out"))
        return result

    def storage(self, tensor: Tensor) -> object:
        """The same for all tensors that share this one's memory, as long as any of them lives."""
        return self._see(tensor, self.made)

    def mark(self, kind: Kind, tensors: Iterable[Tensor | None]) -> None:
        """Say what these tensors are for, whenever they were made. Of a DTensor, its local tensor is meant."""
        for tensor in tensors:
            if tensor is not None:
                storage = self._see(tensor._local_tensor if isinstance(tensor, DTensor) else tensor, kind)
                if storage is not None:
                    storage.kind, storage.final = kind, True

    def mark_live(self, kind: Kind) -> None:
        """Say that all that lives now and was not marked is of this kind, other than what FSDP2 has gathered."""
        self._look_at_gathered()
        for key, storage in list(self._live.items()):
            if not storage.final and key not in self._gathered:
                storage.kind, storage.final = kind, True

    def phase(self, name: str) -> None:
        """From now on this is running."""
        self._phases.append((len(self._changes), name))

    def restart(self) -> None:
        """Forget earlier peaks."""
        self._look_at_gathered()
        self._first = len(self._changes)

    @property
    def recorded(self) -> int:
        """How many changes were recorded."""
        return len(self._changes)

    def record(self, start: int, end: int) -> list[Change]:
        return self._changes[start:end]

    def insert(self, at: int, changes: list[Change]) -> None:
        """Count changes once more, before that with this number."""
        self._changes[at:at] = changes
        self._phases = [(start + len(changes) if start >= at else start, name) for start, name in self._phases]
        self._first += len(changes) if self._first >= at else 0

    def insert_before(self, sizes: Mapping[Kind, int]) -> None:
        """Count bytes of something that was there at the last :meth:`restart` and stays."""
        self.insert(self._first, [(_Storage(size, kind, final=True), size) for kind, size in sizes.items()])

    def memory(self) -> Memory:
        """What was counted since the start or the last :meth:`restart`."""
        self._look_at_gathered()
        now: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        for storage, change in self._changes[: self._first]:
            now[storage.kind] += change
        total = peak = sum(now.values())
        at_peak, most, moment = dict(now), dict(now), self._first
        for index, (storage, change) in enumerate(self._changes[self._first :], self._first):
            now[storage.kind] += change
            total += change
            most[storage.kind] = max(most[storage.kind], now[storage.kind])
            if total > peak:
                peak, at_peak, moment = total, dict(now), index
        phase = [name for start, name in self._phases if start <= moment][-1]
        return Memory(peak, phase, at_peak, most)

    def _see_buffers(self, result: Any, gathered: Any) -> None:
        """What a collective wrote, often into memory made before; of ``gathered``, FSDP2 will free the memory."""
        for index, leaf in enumerate((*tree_leaves(gathered), *tree_leaves(result))):
            storage = self._see(leaf, "collective buffers") if isinstance(leaf, Tensor) else None
            if storage is None:
                continue
            if storage.kind == "temporaries":
                storage.kind = "collective buffers"
            if gathered is not None and index < len(gathered):
                self._gathered[leaf.untyped_storage()._cdata] = storage

    def _see(self, tensor: Tensor, kind: Kind) -> _Storage | None:
        if isinstance(tensor, FakeTensor) != self._under_fake_mode or tensor.is_meta:
            return None  # with real tensors the fake ones are DTensor's way to find out shapes; and the reverse
        raw = tensor.untyped_storage()
        key = raw._cdata
        storage = self._live.get(key)
        if storage is not None:
            self._resize(storage)
            return storage
        storage = self._live[key] = _Storage(raw.nbytes(), kind)
        storage.reference = weakref.ref(raw, lambda _: self._freed(key))
        self._changes.append((storage, storage.nbytes))
        return storage

    def _freed(self, key: int) -> None:
        storage = self._live.pop(key)
        self._gathered.pop(key, None)
        self._changes.append((storage, -storage.nbytes))

    def _resize(self, storage: _Storage) -> None:
        assert storage.reference is not None
        raw = storage.reference()
        if raw is not None and raw.nbytes() != storage.nbytes:
            self._changes.append((storage, raw.nbytes() - storage.nbytes))
            storage.nbytes = raw.nbytes()

    def _look_at_gathered(self) -> None:
        """FSDP2 frees what it gathered by giving its storage no bytes, of which no operation tells."""
        for storage in list(self._gathered.values()):  # one may be freed meanwhile
            if storage.nbytes:
                self._resize(storage)


def _fake_mode_is_active() -> bool:
    return isinstance(torch.empty(0), FakeTensor)
