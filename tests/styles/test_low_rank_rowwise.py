"""A low-rank adapter around a row-wise layer."""

from __future__ import annotations

from functools import partial

import pytest

from fabric_tp.styles import LowRankRowwise, Rowwise
from tests.styles.modules import LowRank
from tests.styles.table import Example, check, name_of, rows

EXAMPLE = Example(LowRankRowwise, partial(LowRank, "f", "h"), inner={"linear": Rowwise(None)})


@pytest.mark.parametrize("row", rows(LowRankRowwise), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)
