"""A low-rank adapter around a column-wise layer."""

from __future__ import annotations

from functools import partial

import pytest

from fabric_tp.styles import Colwise, LowRankColwise
from tests.styles.modules import LowRank
from tests.styles.table import Example, check, name_of, rows

EXAMPLE = Example(LowRankColwise, partial(LowRank, "h", "f"), inner={"linear": Colwise(None)})


@pytest.mark.parametrize("row", rows(LowRankColwise), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)
