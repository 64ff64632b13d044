from __future__ import annotations

import gc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fabric_tp.testing.ranks import Ranks
from tests.forks import Forks

RECIPES = Path(__file__).parent / "recipes"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported by now is no garbage, and to look for some in it takes long


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help='Of the sweeps, run the first of three parts: "1/3"; default: all.')


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``@pytest.mark.swept(condition)``: where the condition holds of the parameters, the test is a sweep.

    A part of the sweeps has every other test of them, the same ones each time; what is marked as
    ``sweep(in_every_part=True)`` is in all.

    Of the two processes that pytest-xdist starts, one runs what needs a pool of ranks, so that one pool of each
    size is enough, and the other the recipes, which share each other's runs; the rest goes to whichever is free.
    """
    for item in items:
        if item.path.parent == RECIPES:
            item.add_marker(pytest.mark.xdist_group("recipes"))
        elif "forks" in item.fixturenames:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.xdist_group("ranks"))
        for mark in item.iter_markers("swept"):
            if mark.args[0](item.callspec.params):  # type: ignore[attr-defined]
                item.add_marker(pytest.mark.sweep)
    part, parts = map(int, config.getoption("part").split("/"))
    items[:] = [item for item in items if _is_in_part(item, part, parts)]


def _is_in_part(item: pytest.Item, part: int, parts: int) -> bool:
    mark = item.get_closest_marker("sweep")
    return mark is None or "in_every_part" in mark.kwargs or zlib.crc32(item.nodeid.encode()) % parts == part - 1
