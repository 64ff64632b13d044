"""An RMSNorm over all heads together, of which each rank has some."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fabric_tp.styles import AllHeadsNorm
from tests.styles.modules import RMSNorm
from tests.styles.table import SIZES, Example, check, name_of, rows
from tests.styles.test_shared_heads import HEADS, heads_of

EXAMPLE = Example(AllHeadsNorm, partial(RMSNorm, SIZES["f"]), {"features": SIZES["f"]}, names={"heads": HEADS})
SHARED = replace(EXAMPLE, x_part=heads_of, y_part=heads_of)


@pytest.mark.parametrize("row", rows(AllHeadsNorm), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, SHARED if row["shared"] == "``heads``" else EXAMPLE, row)


class Centred(RMSNorm):
    """As a LayerNorm."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden - hidden.mean(-1, keepdim=True))


class UnitOffset(RMSNorm):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class Unnamed(RMSNorm):
    """Its epsilon is not where the style looks for it."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__(features)
        del self.eps
        self.small = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.small) * self.weight


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Centred(8), {}),
        (nn.LayerNorm(8), {}),
        (nn.LayerNorm(8, bias=False), {}),
        (UnitOffset(8), {}),
        (RMSNorm(8), {"unit_offset": True}),
        (RMSNorm(8, 1e-6), {"epsilon": 1e-5}),
        (Unnamed(8, 1e-5), {}),
    ],
    ids=["centred", "bias", "LayerNorm", "offset", "no offset", "another epsilon", "an epsilon it does not know"],
)
def test_refuses_what_computes_something_else(module, options) -> None:
    with pytest.raises(ValueError, match=r"takes an RMSNorm with a weight, .* computes something else"):
        AllHeadsNorm(8, **options).validate(module)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (RMSNorm(8, 1e-6), {}),
        (RMSNorm(8, 1e-6), {"epsilon": 1e-6}),
        (UnitOffset(8), {"unit_offset": True}),
        (Unnamed(8, 1e-5), {"epsilon": 1e-5}),
        (nn.RMSNorm(8), {}),
        (nn.RMSNorm(8, 1e-5), {}),
    ],
    ids=["own epsilon", "epsilon", "offset", "said epsilon", "torch's", "torch's epsilon"],
)
def test_takes_what_computes_the_same(module, options) -> None:
    AllHeadsNorm(8, **options).validate(module)
