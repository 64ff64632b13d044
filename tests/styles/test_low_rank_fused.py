"""A low-rank adapter around a linear layer of several blocks."""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn

from fabric_tp.styles import FusedColwise, Heads, LowRankFused
from tests.styles.modules import LowRank
from tests.styles.table import Example, check, name_of, rows
from tests.styles.test_fused_colwise import PARTS, each_part_split

QKV = FusedColwise(PARTS, None)
NO_HEADS = Heads(2, 2)


class LowRankParts(LowRank):
    """Changes some of the blocks only."""

    def __init__(self, *changed: str) -> None:
        super().__init__("h", "f")
        starts = dict(zip(PARTS, accumulate(PARTS.values(), initial=0), strict=False))
        features = torch.cat([torch.arange(starts[part], starts[part] + PARTS[part]) for part in changed])
        self.lora_B = nn.Parameter(self.lora_B.detach()[features])
        self.rows = [PARTS[part] for part in changed]
        self.register_buffer("features", features, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        y = self.linear(hidden)
        assert sum(self.rows) == len(self.lora_B)
        return y.index_add(-1, self.features, hidden @ self.lora_A.T @ self.lora_B.T)


def example(*changed: str) -> Example:
    arguments = {
        "base": QKV,
        "changed": changed,
        "heads": NO_HEADS,
        "row_counts": ("rows",),
        "row_indices": ("features",),
    }
    build = partial(LowRankParts, *changed)
    return Example(LowRankFused, build, arguments, inner={"linear": QKV}, y_part=each_part_split)


EXAMPLE = example(*PARTS)


@pytest.mark.parametrize("row", rows(LowRankFused), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


@pytest.mark.parametrize("changed", [("q",), ("k", "v"), ("q", "v")], ids=str)
def test_some_of_the_parts(pool, changed) -> None:
    (row,) = rows(LowRankFused)
    pool(2)(check, example(*changed), {**row, "lora_B": f"({sum(PARTS[part] for part in changed)}/t, r)"})


def test_refuses_other_rows() -> None:
    with pytest.raises(ValueError, match=r"The parts {'q': 6} are not the rows of lora_B"):
        LowRankFused(QKV, ("q",), NO_HEADS).validate(LowRankParts("q", "v"))
