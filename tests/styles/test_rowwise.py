"""A linear layer split by input features."""

from __future__ import annotations

from functools import partial

import pytest
from torch import nn

from fabric_tp.styles import Rowwise
from tests.styles.modules import linear
from tests.styles.table import Example, check, name_of, rows

EXAMPLE = Example(Rowwise, partial(linear, "f", "h"))


@pytest.mark.parametrize("row", rows(Rowwise), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


def test_takes_only_a_linear_layer() -> None:
    with pytest.raises(ValueError, match=r"Rowwise takes a torch\.nn\.Linear, and this is a Embedding"):
        Rowwise().validate(nn.Embedding(4, 4))
