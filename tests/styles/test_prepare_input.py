"""A module whose column-wise layers share one input."""

from __future__ import annotations

from functools import partial

import pytest

from fabric_tp.styles import Colwise, PrepareInput
from tests.styles.modules import Inside
from tests.styles.table import Example, check, name_of, rows

EXAMPLE = Example(
    PrepareInput,
    partial(Inside, "h", "f"),
    inner={"layers.0": Colwise(None)},
    cells={"y": "(b, s, f/t)"},
)


@pytest.mark.parametrize("row", rows(PrepareInput), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)
