from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fabric_tp.testing.ranks import Ranks
from tests.forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    each = Forks()
    yield each
    each.stop()


@pytest.fixture(scope="session")
def pool(forks) -> Iterator[Callable[[int], Ranks]]:
    """The pool of so many ranks: ``pool(2)(function, *args)``."""
    pools: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in pools:
            pools[size] = Ranks(size, forks)
        return pools[size]

    yield get
    for each in pools.values():
        each.stop()
