"""Key and value projections of fewer heads than there are ranks."""

from __future__ import annotations

from functools import partial

import pytest
from torch import Tensor

from fabric_tp.styles import Heads, SharedHeads
from tests.styles.modules import linear
from tests.styles.table import SIZES, Example, check, name_of, rows

HEADS = Heads(query=6, key_value=SIZES["k"])


def heads_of(whole: Tensor, rank: int) -> Tensor:
    """One for each query head of the rank, since groups of two straddle the ranks."""
    return whole.unflatten(-1, (SIZES["k"], -1))[..., [[0, 0, 1], [1, 2, 2]][rank], :].flatten(-2)


EXAMPLE = Example(SharedHeads, partial(linear, "h", "f", bias=False), {"heads": HEADS}, y_part=heads_of)


@pytest.mark.parametrize("row", rows(SharedHeads), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


def test_bias(pool) -> None:
    example = Example(SharedHeads, partial(linear, "h", "f"), {"heads": HEADS}, y_part=heads_of)
    pool(2)(check, example, {**rows(SharedHeads)[0], "gradient": "partial: weight, bias"})
