"""A dataloader that is the same to all ranks of a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from fabric_tp.data.broadcast import BATCH, Broadcast, Item
from fabric_tp.data.lengths import InStep
from fabric_tp.data.repair import Preparation
from fabric_tp.data.verify import Verifier

_NOTHING = object()


@dataclass
class Setup:
    """What a :class:`ParallelDataLoader` is made of, besides the user's dataloader.

    Args:
        number: Of the dataloader, in the order of setup.
        length: Batches of a pass on all ranks, or None.
        exact: A pass has exactly that many.
        progress: How many forwards the model has run, which is in step on all ranks.
        preparation: On ranks that load.
        in_step: Where the ranks that load agree, batch by batch, whether there is another.
        broadcast: Where only the first rank loads.
        verifier: Where batches are compared.
    """

    number: int
    length: int | None
    exact: bool
    progress: Callable[[], int]
    preparation: Preparation | None
    in_step: InStep | None
    broadcast: Broadcast | None
    verifier: Verifier | None


@dataclass(frozen=True)
class _Pass:
    epoch: int
    forwards: int
    """That the model had run when the pass began."""


class ParallelDataLoader:
    """The user's dataloader, with its attributes, whose batches are the same in each tensor-parallel group.

    A pass is of the next epoch if the model has run forward since the last pass began, and otherwise of the same. So a
    batch that one rank alone looks at (``next(iter(dataloader))``) does not put it an epoch ahead of the others.

    Args:
        dataloader: Of the user.
        setup: From :class:`~fabric_tp.data.Inputs`.
    """

    def __init__(self, dataloader: DataLoader, setup: Setup) -> None:
        self.__dict__.update(dataloader.__dict__)  # Fabric's wrapper copies ours in its turn
        self._user_dataloader, self._setup = dataloader, setup
        self._last_pass: _Pass | None = None
        self._passes = 0
        self._state: Any = None
        if hasattr(dataloader, "state_dict") and hasattr(dataloader, "load_state_dict"):
            self.state_dict, self.load_state_dict = self._state_dict, self._load_state_dict

    def __getattr__(self, name: str) -> Any:
        if name == "_user_dataloader":  # while being unpickled
            raise AttributeError(name)
        return getattr(self._user_dataloader, name)

    def __len__(self) -> int:
        """Batches of a pass on all ranks. Raises TypeError if that is not known."""
        if self._setup.length is None:
            raise TypeError(f"The length of this {type(self._user_dataloader).__name__} is not known")
        return self._setup.length

    def __iter__(self) -> Iterator[Any]:
        this = self._last_pass = self._next_pass()
        verifier, number = self._setup.verifier, self._setup.number
        for index, item in enumerate(self._items(this.epoch)):
            self._last_pass = this  # passes that began meanwhile were only looked into
            self._state = item.note
            if verifier:
                verifier.note(number, this.epoch, index, item.content)
            yield item.content
        self._last_pass, self._state = this, None

    def _next_pass(self) -> _Pass:
        forwards, last = self._setup.progress(), self._last_pass
        if last is None:
            return _Pass(0, forwards)
        return _Pass(last.epoch + (forwards > last.forwards), forwards)

    def _items(self, epoch: int) -> Iterator[Item]:
        broadcast, in_step = self._setup.broadcast, self._setup.in_step
        if broadcast:
            return broadcast.items(self._load(epoch))
        loading = self._load(epoch)
        return loading if in_step is None else self._load_in_step(loading, in_step)

    def _load(self, epoch: int) -> Iterator[Item]:
        """The batches of a pass, drawing from random states that nothing else draws from."""
        assert self._setup.preparation is not None
        random_stream = self._setup.preparation.start_pass(epoch)
        with random_stream.active():
            batches = iter(self._user_dataloader)
        length = self._setup.length if self._setup.exact else None
        loaded = 0
        while loaded != length:
            with random_stream.active():
                batch = next(batches, _NOTHING)
            if batch is _NOTHING:
                break
            loaded += 1
            yield Item(BATCH, batch, self._state_now())
        if length is not None and loaded < length:
            raise ValueError(
                f"Dataloader {self._setup.number} has ended after {loaded} of the {length} batches that its len()"
                " promises, and other ranks wait for the rest. Correct the len() of its sampler."
            )

    def _load_in_step(self, loading: Iterator[Item], in_step: InStep) -> Iterator[Item]:
        number, index = self._passes, 0
        self._passes += 1
        while True:
            item = next(loading, None)
            if not in_step.all_have(number, index, item is not None):
                return
            assert item is not None
            yield item
            index += 1

    def _state_now(self) -> Any:
        """Batches are broadcast ahead of their use, so the dataloader's state when one is used is kept with it."""
        if self._setup.broadcast and hasattr(self, "state_dict"):
            return self._user_dataloader.state_dict()  # type: ignore[attr-defined]
        return None

    def _state_dict(self) -> dict[str, Any]:
        if self._setup.preparation is None:
            return {}
        return self._state or self._user_dataloader.state_dict()  # type: ignore[attr-defined]

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = None
        if self._setup.preparation is not None:
            self._user_dataloader.load_state_dict(state)  # type: ignore[attr-defined]
