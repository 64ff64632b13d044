"""A module that draws random numbers and is whole on every rank: all draw the same."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from torch import nn

from fabric_tp.styles import RandomReplicated
from fabric_tp.styles.random_module import RandomModule
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.small import small_causal
from tests.styles.dropout_runs import follow, train, worst
from tests.styles.table import check, name_of, rows
from tests.styles.test_replicated import EXAMPLE as WITHOUT_RANDOM_NUMBERS
from tests.styles.test_replicated import SINGLE_HEADS

EXAMPLE = replace(WITHOUT_RANDOM_NUMBERS, style=RandomReplicated, after=follow)
ROUTERS = partial(small_causal, "phimoe", router_jitter_noise=1.0)


@pytest.mark.parametrize("row", rows(RandomReplicated), ids=name_of)
def test_table(pool, row) -> None:
    single_heads = replace(SINGLE_HEADS, style=RandomReplicated, after=follow)
    pool(2)(check, single_heads if row["weight"] == "(d,)" else EXAMPLE, row)


def draw_by_rank(model: nn.Module) -> None:
    routers = [module for module in model.modules() if isinstance(module, RandomModule)]
    assert routers
    for router in routers:
        router.by_rank = True  # type: ignore[misc]


def test_routers_choose_the_same_experts_on_all_ranks(pool) -> None:
    expected = pool(1)(train, ROUTERS, {}, (1, 1))
    assert worst(pool(2)(train, ROUTERS, {}, (1, 2)), expected) < TOLERANCE
    assert worst(pool(2)(train, ROUTERS, {}, (1, 2), break_model=draw_by_rank), expected) > 10 * TOLERANCE
