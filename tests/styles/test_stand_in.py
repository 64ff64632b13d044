"""A tensor that a forward may measure, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fabric_tp
from fabric_tp.styles.stand_in import stand_in, whole
from fabric_tp.testing.ranks import mesh
from tests.architectures.hand_written import CausalSelfAttention, NanoGPT


def test_measures_and_stands_for() -> None:
    x = torch.randn(2, 3, 8)
    measured = stand_in(x, 4)
    assert measured.size() == (2, 3, 4)
    assert measured.untyped_storage().nbytes() == x.element_size()
    assert whole(measured) is x
    assert whole(x) is x
    assert (measured + 1).isnan().all()


class Another(CausalSelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * x.sum()


def another() -> None:
    model = NanoGPT(96)
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.__class__ = Another
    with pytest.raises(ValueError, match=r"transformer\.h\.0 gives something else on 2 ranks .*: nan off"):
        fabric_tp.auto()(model, mesh(1, 2))


def test_all_else_is_noticed(pool) -> None:
    pool(2)(another)
