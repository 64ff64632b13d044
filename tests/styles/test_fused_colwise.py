"""A linear layer of several blocks of output features, each split by itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fabric_tp.styles import FusedColwise
from tests.styles.modules import linear
from tests.styles.table import Example, check, name_of, rows
from tests.styles.test_shared_heads import HEADS, heads_of

PARTS = {"q": 6, "k": 4, "v": 2}


def each_part_split(whole: Tensor, rank: int) -> Tensor:
    return torch.cat([part.chunk(2, -1)[rank] for part in whole.split(list(PARTS.values()), -1)], -1)


EXAMPLE = Example(FusedColwise, partial(linear, "h", "f"), {"parts": PARTS}, y_part=each_part_split)


@pytest.mark.parametrize("row", rows(FusedColwise), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


def queries_split_keys_shared(whole: Tensor, rank: int) -> Tensor:
    q, k = whole.split([8, 12], -1)
    return torch.cat([q.chunk(2, -1)[rank], heads_of(k, rank)], -1)


def test_shared_keys(pool) -> None:
    """Whole on each rank, which computes with its heads; and so their gradients are partial."""
    example = Example(
        FusedColwise,
        partial(nn.Linear, 22, 20),
        {"parts": {"q": 8, "k": 12}, "shared": {"k": HEADS}},
        y_part=queries_split_keys_shared,
        cells={"x": "(b, s, h)", "weight": "(8/t + 12, h)", "y": "(b, s, 8/t + k * d)"},
    )
    pool(2)(check, example, {"gradient": "partial: k.weight, k.bias", "forward": "", "backward": "all-reduce"})


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Embedding(4, 4), r"takes a torch\.nn\.Linear, and this is a Embedding"),
        (nn.Linear(4, 13), r"The parts .* do not add up to the 13 output features"),
    ],
)
def test_refuses(module, message) -> None:
    with pytest.raises(ValueError, match=message):
        FusedColwise(PARTS).validate(module)
