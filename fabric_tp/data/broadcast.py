"""Batches that the first rank of a group loads and the others receive, ahead of their use."""

from __future__ import annotations

import io
import pickle
import queue
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fabric_tp.data.groups import gather_numbers
from fabric_tp.data.lengths import InStep

ALIGNMENT = 64
BATCH, END, FAILURE = range(3)
SECONDS_TO_END = 5.0


@dataclass
class Item:
    """What comes next: a batch, the end of the pass (its content is None) or a failure (an exception, or its text)."""

    kind: int
    content: Any = None
    note: Any = None
    """What the loading rank knows about it; not sent."""


class Broadcast:
    """Sends the batches of a dataloader from the first rank of a group to the others.

    A thread of its own does the transfers, in a group of its own, so they overlap with computation and never meet the
    collectives of training. It is always exactly ``prefetch`` batches ahead of what this rank has consumed. So ranks
    that leave a pass at the same batch have sent and received the same, and nothing is left over. Loading is not the
    thread's business: a dataset that draws from the global random states would disturb the main thread's.

    Args:
        group: Of all that get the same batches, on the CPU, and of this object alone.
        in_step: Of the ranks that load, if the length of a pass is not known; unused on the others.
        prefetch: How many batches to transfer ahead.
        pin_memory: Receive into page-locked memory, where there is CUDA.
    """

    def __init__(self, group: ProcessGroup, *, in_step: InStep | None, prefetch: int, pin_memory: bool) -> None:
        self._group, self._in_step, self._prefetch = group, in_step, prefetch
        self._device = torch.cuda.current_device() if pin_memory and torch.cuda.is_available() else None
        self._thread = _Thread()
        self._passes = 0

    @property
    def loads(self) -> bool:
        """Whether this is the rank that loads."""
        return self._group.rank() == 0

    def items(self, loading: Iterator[Item]) -> Iterator[Item]:
        """The batches of one pass.

        Args:
            loading: They and their notes, on the rank that loads; unused on the others.

        Raises:
            ValueError: The ranks are at different batches.
            RuntimeError: The other rank failed to load, whose traceback this shows. There, its own exception.
        """
        current = _Pass(self._group, self._in_step, self._device, self._passes)
        self._passes += 1
        pending: deque[tuple[Item | None, Future[Item]]] = deque()
        index, more, sent = 0, True, None
        while True:
            while more and len(pending) <= self._prefetch:
                if self.loads:
                    loaded = _load(loading)
                    more = loaded.kind == BATCH
                    known = None if self._in_step else loaded
                    pending.append((known, self._thread.submit(current.send, index, loaded)))
                else:
                    pending.append((None, self._thread.submit(current.receive, index)))
                index += 1
            if sent:  # errors of the last transfer
                _raise_failure(sent.result())
            known, future = pending.popleft()
            # A rank that looks at a batch alone must not wait for others, who may be waiting for it in the forward.
            item, sent = (future.result(), None) if known is None else (known, future)
            _raise_failure(item)
            if item.kind == END:
                return
            yield item

    def close(self) -> None:
        """Finish the transfers that other ranks wait for."""
        self._thread.close()


class _Pass:
    """The transfers of one pass; its methods run in the thread."""

    def __init__(self, group: ProcessGroup, in_step: InStep | None, device: int | None, number: int) -> None:
        self._group, self._in_step, self._device, self._number = group, in_step, device, number
        self._ended = False

    def send(self, index: int, item: Item) -> Item:
        if self._ended:
            return Item(END)
        if self._in_step and not self._in_step.all_have(self._number, index, item.kind != END):
            item = Item(END)
        try:
            structure, content = _pack(_sendable(item))
        except Exception as error:  # of an object in the batch that cannot be pickled
            item = Item(FAILURE, error)
            structure, content = _pack(_sendable(item))
        self._meet(index, item.kind, structure, content.numel())
        dist.broadcast(content, group=self._group, group_src=0)
        return item

    def receive(self, index: int) -> Item:
        if self._ended:
            return Item(END)
        kind, structure, size = self._meet(index)
        content = self._empty(size)
        dist.broadcast(content, group=self._group, group_src=0)
        item = Item(kind, _unpack(structure, content))
        return self._failure(item.content) if kind == FAILURE else item

    def _meet(self, index: int, kind: int = BATCH, structure: int = 0, size: int = 0) -> list[int]:
        """Learn from the first rank what it is about to send, and make sure that it is what all wait for."""
        every = gather_numbers([self._number, index, kind, structure, size], self._group)
        header = every[0][2:]
        self._ended = header[0] != BATCH
        if any(each[:2] != every[0][:2] for each in every):
            self._ended = True
            ranks = dist.get_process_group_ranks(self._group)
            places = [
                f"batch {each[1]} of pass {each[0]} on rank {rank}" for each, rank in zip(every, ranks, strict=True)
            ]
            raise ValueError(
                f"A dataloader with broadcast_inputs=True is at {', '.join(places)}. All ranks must take the same"
                " batches: look at one, as with next(iter(dataloader)), on all of them or in a dataloader of its own."
            )
        return header

    def _empty(self, size: int) -> Tensor:
        if self._device is None:
            return torch.empty(size, dtype=torch.uint8)
        with torch.cuda.device(self._device):  # a new thread would otherwise wake the first GPU
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def _failure(self, text: str) -> Item:
        rank = dist.get_global_rank(self._group, 0)
        return Item(FAILURE, RuntimeError(f"Rank {rank} failed to load the next batch:\n{text}"))


class _Thread:
    """Runs calls one after the other, and ends with the interpreter rather than keep it waiting."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        thread = threading.Thread(target=_run, args=(self._calls,), daemon=True, name="fabric_tp-broadcast")
        thread.start()
        self._end = weakref.finalize(self, _end, self._calls, thread)

    def submit(self, function: Callable[..., Item], *args: Any) -> Future[Item]:
        future: Future[Item] = Future()
        self._calls.put((future, function, args))
        return future

    def close(self) -> None:
        self._end()


def _run(calls: queue.SimpleQueue) -> None:
    while (call := calls.get()) is not None:
        future, function, args = call
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
        del call, future, function, args  # or the last batch would stay until the next


def _end(calls: queue.SimpleQueue, thread: threading.Thread) -> None:
    calls.put(None)
    thread.join(SECONDS_TO_END)


def _raise_failure(item: Item) -> None:
    if item.kind == FAILURE:
        raise item.content


def _load(loading: Iterator[Item]) -> Item:
    try:
        return next(loading, Item(END))
    except Exception as error:
        return Item(FAILURE, error)


def _sendable(item: Item) -> Any:
    return "".join(traceback.format_exception(item.content)) if item.kind == FAILURE else item.content


def _pack(batch: Any) -> tuple[int, Tensor]:
    """Everything in one buffer of bytes: the batch's structure, pickled, of so many bytes, and its tensors' content."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(batch)
    structure = stream.getvalue()
    start = _aligned(len(structure))
    buffer = torch.empty(start + pickler.size, dtype=torch.uint8)
    buffer[: len(structure)] = torch.frombuffer(bytearray(structure), dtype=torch.uint8)
    for tensor, offset in pickler.tensors.values():
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        buffer[start + offset : start + offset + content.numel()] = content
    return len(structure), buffer


def _unpack(structure: int, buffer: Tensor) -> Any:
    """The batch, whose tensors are parts of the buffer."""
    stream = io.BytesIO(buffer[:structure].numpy().tobytes())
    return _Unpickler(stream, buffer[_aligned(structure) :]).load()


class _Pickler(pickle.Pickler):
    """Leaves the content of tensors out. Ranks of one run trust each other's pickles, as in all_gather_object()."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: dict[int, tuple[Tensor, int]] = {}
        self.size = 0

    def persistent_id(self, item: Any) -> tuple[torch.dtype, torch.Size, int] | None:
        if type(item) is not Tensor or item.layout != torch.strided or item.device.type != "cpu" or item.is_quantized:
            return None
        if id(item) not in self.tensors:
            self.tensors[id(item)] = (item, self.size)
            self.size += _aligned(item.numel() * item.element_size())
        return item.dtype, item.shape, self.tensors[id(item)][1]


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, content: Tensor) -> None:
        super().__init__(stream)
        self._content = content

    def persistent_load(self, saved: tuple[torch.dtype, torch.Size, int]) -> Tensor:
        dtype, shape, offset = saved
        return self._content[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
