"""A bias for the vocabulary in a module other than the head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fabric_tp.styles import HeadBias
from tests.styles.table import SIZES, Example, check, name_of, rows


class Bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(SIZES["v"]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


EXAMPLE = Example(HeadBias, Bias)


@pytest.mark.parametrize("row", rows(HeadBias), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)
