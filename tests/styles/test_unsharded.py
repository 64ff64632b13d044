"""A module that every rank computes whole."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fabric_tp.styles import Replicated, Unsharded
from fabric_tp.testing.ranks import mesh
from tests.styles.modules import Inside
from tests.styles.table import Example, check, name_of, rows

EXAMPLE = Example(Unsharded, partial(Inside, "h", "h"), inner={"layers.0": Replicated()})


@pytest.mark.parametrize("row", rows(Unsharded), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


class WithWeights(nn.Module):
    """As attention that returns its weights too."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, hidden.sum(-1)


def shapes_of_both() -> list[tuple[int, ...]]:
    module = Unsharded("sequence")._apply(WithWeights(), mesh(1, 2)["tensor_parallel"])
    return [tuple(each.shape) for each in module(torch.zeros(5, 8, 4))]


def test_only_the_first_output_is_scattered(pool) -> None:
    assert pool(2)(shapes_of_both) == [(5, 8, 4), (5, 16)]
