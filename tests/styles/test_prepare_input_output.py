"""A module that makes partial sums of its output in several places."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module

from fabric_tp.styles import Colwise, Layout, PrepareInputOutput, Rowwise
from fabric_tp.styles.style import check_divisible
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import randomize
from tests.styles.modules import linear
from tests.styles.table import SIZES, Example, check, name_of, rows, seeded


class Sum(nn.Module):
    """Two MLPs, one after the other added up."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(linear("h", "f") for _ in range(2))
        self.down = nn.ModuleList(linear("f", "h") for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = tuple(hidden.shape)
        return self.down[0](self.up[0](hidden)) + self.down[1](self.up[1](hidden))


class Flat(Sum):
    """The same of all tokens in a row, and something beside it."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, str]:  # type: ignore[override]
        self.seen = tuple(hidden.shape)
        x = hidden.flatten(0, 1)
        return self.down[0](self.up[0](x)) + self.down[1](self.up[1](x)), "beside it"


class Weighted(Sum):
    """What it gives of all tokens is weighted by numbers of its own, and reshaped by the count of hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(SIZES["h"]))
        self.counted = nn.Module()
        self.counted.features = SIZES["f"]  # type: ignore[assignment]

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = tuple(hidden.shape)
        y = torch.zeros_like(hidden)
        for up, down in zip(self.up, self.down, strict=True):
            y = y + self.weights * down(up(hidden).view(*hidden.shape[:2], self.counted.features))
        return y


EXAMPLE = Example(
    PrepareInputOutput,
    Sum,
    inner={f"{name}.{i}": style for i in range(2) for name, style in (("up", Colwise(None)), ("down", Rowwise(None)))},
)


@pytest.mark.parametrize("row", rows(PrepareInputOutput), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


def test_own_parameters_and_sizes(pool) -> None:
    example = replace(EXAMPLE, build=Weighted, arguments={"whole": ("weights",), "hidden_sizes": ("counted.features",)})
    row = rows(PrepareInputOutput)[0]
    pool(2)(check, example, {**row, "weights": "(h,)", "gradient": "partial: weights"})
    with pytest.raises(ValueError, match=r"counted\.features=12"):
        check_divisible("Weighted", example.style_of(row).divided(Weighted()), 5)


def both(layout: Layout) -> bool:
    """Whether the rows, in a row and not, are the same."""
    models = [randomize(seeded(each)) for each in (Sum, Flat)]
    for model in models:
        plan = {"": PrepareInputOutput(layout, layout), **EXAMPLE.inner}
        parallelize_module(model, mesh(1, 2)["tensor_parallel"], plan)
    x = torch.randn(4, 6, SIZES["h"], generator=torch.Generator().manual_seed(0))
    expected, (flat, beside) = (model(x) for model in models)
    return beside == "beside it" and torch.allclose(flat, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["sequence", "replicate"])
def test_all_tokens_in_a_row(pool, layout) -> None:
    assert pool(2)(both, layout)
