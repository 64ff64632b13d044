"""The last norm of a model that reshapes its output: every rank gets all of it."""

from __future__ import annotations

from functools import partial

import pytest

from fabric_tp.styles import GatherOutput
from tests.styles.modules import RMSNorm
from tests.styles.table import SIZES, Example, check, name_of, rows

EXAMPLE = Example(GatherOutput, partial(RMSNorm, SIZES["h"]))


@pytest.mark.parametrize("row", rows(GatherOutput), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)
