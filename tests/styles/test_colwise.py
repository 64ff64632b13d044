"""A linear layer split by output features."""

from __future__ import annotations

from functools import partial

import pytest

from fabric_tp.styles import Colwise
from tests.styles.modules import linear
from tests.styles.table import Example, check, name_of, rows

EXAMPLE = Example(Colwise, partial(linear, "h", "f"))


@pytest.mark.parametrize("row", rows(Colwise), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)
