"""A module that makes partial sums of its output in several places."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from fabric_tp.styles import Colwise, PrepareInputOutput, Rowwise
from tests.styles.modules import linear
from tests.styles.table import Example, check, name_of, rows


class Sum(nn.Module):
    """Two MLPs, one after the other added up."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(linear("h", "f") for _ in range(2))
        self.down = nn.ModuleList(linear("f", "h") for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = tuple(hidden.shape)
        return self.down[0](self.up[0](hidden)) + self.down[1](self.up[1](hidden))


EXAMPLE = Example(
    PrepareInputOutput,
    Sum,
    inner={f"{name}.{i}": style for i in range(2) for name, style in (("up", Colwise(None)), ("down", Rowwise(None)))},
)


@pytest.mark.parametrize("row", rows(PrepareInputOutput), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)
