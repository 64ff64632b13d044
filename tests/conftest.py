from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fabric_tp.testing.ranks import Ranks


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Ranks]]:
    """The pool of so many ranks: ``pool(2)(function, *args)``."""
    pools: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in pools:
            pools[size] = Ranks(size)
        return pools[size]

    yield get
    for each in pools.values():
        each.stop()
