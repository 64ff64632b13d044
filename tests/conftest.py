from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """The pool of so many ranks: ``pool(2)(function, *args)``."""
    pools: dict[int, Pool] = {}

    def get(size: int) -> Pool:
        if size not in pools:
            pools[size] = Pool(size)
        return pools[size]

    yield get
    for each in pools.values():
        each.stop()
