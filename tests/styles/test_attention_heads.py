"""An attention module that computes with this rank's heads only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from fabric_tp.styles import Colwise, Heads, ShardHeads
from fabric_tp.styles.attention_heads import set_attributes
from tests.styles.modules import Attention
from tests.styles.table import SIZES, Example, check, name_of, rows

EXAMPLE = Example(
    ShardHeads,
    Attention,
    {"heads": Heads(SIZES["n"], SIZES["n"]), "query_counts": ("n_heads",)},
    inner=dict.fromkeys(("q", "k", "v"), Colwise(None)),
    cells={"y": "(b, s, n * d/t)"},
)


@pytest.mark.parametrize("row", rows(ShardHeads), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


@pytest.mark.parametrize(
    ("heads", "size", "group", "chosen"),
    [
        (Heads(8, 4), 2, 2, [[0, 1], [2, 3]]),
        (Heads(8, 8), 4, 1, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (Heads(8, 2), 4, 2, [[0], [0], [1], [1]]),
        (Heads(8, 1), 2, 4, [[0], [0]]),
        (Heads(6, 3), 2, 1, [[0, 0, 1], [1, 2, 2]]),
        (Heads(12, 3), 2, 2, [[0, 0, 1], [1, 2, 2]]),
    ],
    ids=str,
)
def test_which_heads_a_rank_computes(heads, size, group, chosen) -> None:
    assert heads.group_size(size) == group
    assert heads.splits_key_value(size) == (heads.key_value % size == 0)
    assert [heads.key_value_heads(size, rank) for rank in range(size)] == chosen
    assert {heads.local_key_value(size)} == {len(each) for each in chosen}
    for rank, each in enumerate(chosen):  # every query head finds its own
        for query in range(heads.local_query(size)):
            whole = rank * heads.local_query(size) + query
            assert each[query // group] == whole // (heads.query // heads.key_value)


def test_what_holds_a_count_is_copied() -> None:
    """Other modules may have the same config."""
    module: Any = nn.Module()
    module.config = SimpleNamespace(n_head=8, inner=SimpleNamespace(groups=4))
    module.n_head = 8
    config, inner = module.config, module.config.inner
    set_attributes(module, {"n_head": 4, "config.n_head": 4, "config.inner.groups": 2})
    assert (module.n_head, module.config.n_head, module.config.inner.groups) == (4, 4, 2)
    assert (config.n_head, inner.groups) == (8, 4)
    assert config.inner is inner
