"""The first block, which takes its part of the sequence."""

from __future__ import annotations

from functools import partial

import pytest

from fabric_tp.styles import Replicated, ScatterInput
from tests.styles.modules import Inside
from tests.styles.table import Example, check, name_of, rows

EXAMPLE = Example(
    ScatterInput,
    partial(Inside, "h", "h"),
    inner={"layers.0": Replicated("sequence")},
    cells={"y": "(b, s/t, h)"},
)


@pytest.mark.parametrize("row", rows(ScatterInput), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)
