"""A low-rank adapter around the last layer."""

from __future__ import annotations

from functools import partial

import pytest

from fabric_tp.styles import Colwise, LowRankHead
from tests.styles.modules import LowRank
from tests.styles.table import Example, check, name_of, rows

EXAMPLE = Example(LowRankHead, partial(LowRank, "h", "v"), inner={"linear": Colwise(None)})


@pytest.mark.parametrize("row", rows(LowRankHead), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)
