"""A module that every rank holds whole."""

from __future__ import annotations

from functools import partial

import pytest

from fabric_tp.styles import Replicated
from tests.styles.modules import RMSNorm
from tests.styles.table import SIZES, Example, check, name_of, rows

EXAMPLE = Example(Replicated, partial(RMSNorm, SIZES["h"]))
SINGLE_HEADS = Example(Replicated, partial(RMSNorm, SIZES["d"]))


@pytest.mark.parametrize("row", rows(Replicated), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, SINGLE_HEADS if row["weight"] == "(d,)" else EXAMPLE, row)
