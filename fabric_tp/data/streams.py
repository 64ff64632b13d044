"""Random states of their own for parts of the program that must not see, nor disturb, each other's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fabric_tp.seeds import mix


class RandomStream:
    """The global random states of Python, NumPy and torch's CPU, as one part of the program sees them.

    Args:
        seed: What the stream starts from.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: tuple[Any, ...] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream inside; the states that were there are back afterwards."""
        outside = _get_states()
        if self._states is None:
            _seed_all(self._seed)
        else:
            _set_states(self._states)
        try:
            yield
        finally:
            self._states = _get_states()
            _set_states(outside)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(mix(seed, "numpy") % 2**32)  # noqa: NPY002 - the global state is what datasets draw from
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too


def _get_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _set_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
