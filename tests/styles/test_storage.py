"""Linear layers whose weight is stored as (inputs, outputs): the same tables, with that weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fabric_tp.architectures.linear import features, storage
from fabric_tp.styles import Rowwise, SharedHeads
from tests.styles import test_colwise, test_fused_colwise, test_rowwise, test_shared_heads
from tests.styles.table import SIZES, check, rows

EXAMPLES = {each.EXAMPLE.style: each.EXAMPLE for each in (test_colwise, test_fused_colwise, test_rowwise)}


def to_hidden() -> nn.Module:
    return Conv1D(SIZES["f"], SIZES["h"])


def from_hidden() -> nn.Module:
    return Conv1D(SIZES["h"], SIZES["f"])


@pytest.mark.parametrize("style", EXAMPLES)
def test_table(pool, style) -> None:
    example = replace(EXAMPLES[style], build=from_hidden if style is Rowwise else to_hidden)
    row = next(row for row in rows(style) if '"sequence"' in str(row))
    pool(2)(check, example, {**row, "weight": "(f/t, h)" if style is Rowwise else "(h, f/t)"})


def test_shared_keys(pool) -> None:
    """The rows of keys that a rank computes with are columns here."""
    example = replace(test_shared_heads.EXAMPLE, build=to_hidden)
    pool(2)(check, example, {**rows(SharedHeads)[0], "weight": "(h, f)", "gradient": "partial: weight, bias"})


class Changed(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_forward_of_its_own_is_not_known() -> None:
    assert storage(Conv1D(3, 2)) == "inputs_first"
    assert features(Conv1D(3, 2)) == features(nn.Linear(2, 3)) == (2, 3)
    assert storage(Changed(3, 2)) is None
    with pytest.raises(ValueError, match=r"Rowwise takes a torch\.nn\.Linear, and this is a Changed"):
        Rowwise().validate(Changed(3, 2))
