"""A model's position in a run, which decides its random masks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fabric_tp import _torch
from fabric_tp.autograd.dropout import Mask
from fabric_tp.autograd.halves import Half, alone, current_half
from fabric_tp.seeds import mix

FORWARDS = 16
"""Forwards of the model that may wait for their backward at once, where activations are checkpointed."""


@dataclass
class Forward:
    """A training forward of the model."""

    first: int = 0
    """Number, within the run, of its first sample on the first data-parallel rank."""
    batch: int = 0
    """Samples on each data-parallel rank."""
    calls: dict[tuple[str, int], int] = field(default_factory=dict)
    """Calls of each module, with each half of the batch if they take turns."""
    records: dict[int, int] = field(default_factory=dict)
    """Calls of the same module that came before a call, for the number that this one drew."""


class RunPosition:
    """Position of a model in the run: what its random masks depend on, besides the seed and the modules' names.

    Args:
        seed: Of the run.
        data_parallel_rank: Of this rank's samples.
        data_parallel_size: Ranks that each take as many samples.

    Sample i of a training forward on data-parallel rank r of d has the number ``samples + i * d + r``, if ``samples``
    came before it in the whole run. This is how distributed samplers deal samples out, so that a sample has the same
    number on any mesh and in micro-batches of any size. Each data-parallel rank must take equally many.

    A forward that is repeated in the backward, by activation checkpointing, gets the masks of the first time: each call
    draws a number from torch's generator, whose state checkpointing restores, and finds its record by it. The number
    itself has no influence on the masks.
    """

    def __init__(self, seed: int, data_parallel_rank: int = 0, data_parallel_size: int = 1) -> None:
        self.seed = seed
        self.samples = 0
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self._forwards = deque([Forward()], maxlen=FORWARDS)

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.samples = int(state["seed"]), int(state["samples"])

    @torch.compiler.disable
    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook of the model: the samples are the rows of its first tensor."""
        if not module.training or _torch.current_backward() != -1:
            return
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim())
        batch = next((len(tensor) for tensor in tensors), 0)
        self._forwards.append(Forward(self.samples, batch))
        self.samples += batch * self.data_parallel_size

    def call(self, name: str) -> tuple[Forward, int]:
        """The forward to which a call of this module belongs, and how many calls of the module came before in it.

        Raises:
            ValueError: The module runs again, in the backward, and no record of the first time is found.
        """
        token = _torch.draw()
        if _torch.current_backward() != -1:
            for forward in reversed(self._forwards):
                if token in forward.records:
                    return forward, forward.records[token]
            raise ValueError(
                f"{name} runs again in the backward, and what its random mask was in the forward is not known. Either"
                " activations were checkpointed with preserve_rng_state=False, which must be True for random masks, or"
                f" more than {FORWARDS} forwards came before this backward."
            )
        forward, half = self._forwards[-1], current_half()
        key = name, half.index if half else 0
        number = forward.records[token] = forward.calls.get(key, 0)
        forward.calls[key] = number + 1
        return forward, number

    def mask(self, name: str, rate: float, x: Tensor, shard_dim: int | None, shard_rank: int) -> Mask:
        """The mask for this call of a module.

        Args:
            name: Of the module.
            rate: Share of the elements to drop.
            x: ``(b, ...)``, this rank's part of the module's input: samples, the same on all tensor-parallel ranks.
            shard_dim: The dimension of ``x`` of which each tensor-parallel rank has a part, if there is one.
            shard_rank: Which part.

        Raises:
            ValueError: As for :meth:`call`.
        """
        forward, number = self.call(name)
        half = current_half() or Half(0, 0, forward.batch)
        if x.shape[0] == half.size:
            key = mix(self.seed, name, number)
            stride = self.data_parallel_size
            first = forward.first + self.data_parallel_rank + half.first * stride
        else:  # such as the tokens of an expert, of which nobody knows the samples
            key = mix(self.seed, name, number, forward.first, self.data_parallel_rank, *_of(half))
            first, stride = 0, 1
        return Mask(rate, key, first, stride, shard_dim, shard_rank)

    @contextmanager
    def seeded(self, name: str, device: torch.device, tensor_parallel_rank: int) -> Iterator[None]:
        """Run something with torch's generators in a state of this call's own, on this rank; then restore theirs.

        Raises:
            ValueError: As for :meth:`call`.
        """
        forward, number = self.call(name)
        half = _of(current_half())
        seed = mix(self.seed, name, number, forward.first, self.data_parallel_rank, tensor_parallel_rank, *half)
        devices = [device] if device.type != "cpu" else []
        with alone(), torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(seed % 2**63)
            yield


def _of(half: Half | None) -> tuple[int, ...]:
    """What tells random numbers of a half from those of the first, which has those of a whole batch."""
    return (half.index,) if half and half.index else ()
