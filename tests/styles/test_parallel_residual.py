"""A block whose attention and MLP share a norm, a gather and a reduction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fabric_tp.styles import Colwise, ParallelResidual, Rowwise
from fabric_tp.testing.ranks import mesh
from tests.styles.modules import Inside, linear
from tests.styles.table import SIZES, Example, check, name_of, rows


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZES["h"], elementwise_affine=False)
        self.attention = Inside("h", "f", "h")
        self.mlp = nn.Sequential(linear("h", "f"), linear("f", "h"))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return hidden + self.attention(normed) + self.mlp(normed)


EXAMPLE = Example(
    ParallelResidual,
    Block,
    {"norm": "norm", "attention": "attention", "feed_forward": "mlp"},
    inner={
        "attention.layers.0": Colwise(None),
        "attention.layers.1": Rowwise(None),
        "mlp.0": Colwise(None),
        "mlp.1": Rowwise(None),
    },
)


@pytest.mark.parametrize("row", rows(ParallelResidual), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


class Shift(nn.Module):
    def forward(self, hidden: Tensor, by: float = 0.0, *, and_by: float = 0.0) -> Tensor:
        return hidden + by + and_by


def shifted() -> Tensor:
    block = nn.ModuleDict({"norm": nn.Identity(), "attention": Shift(), "mlp": nn.Identity()})
    module = ParallelResidual("norm", "attention", "mlp")._apply(block, mesh(1, 2)["tensor_parallel"])
    return module(torch.zeros(1, 2, 3), 1.0, and_by=10.0)


def test_attention_gets_the_other_arguments(pool) -> None:
    """Each of the two ranks adds the same partial sum."""
    assert pool(2)(shifted).eq(22).all()


def test_refuses_a_block_without_such_a_module() -> None:
    with pytest.raises(AttributeError, match="has no attribute `feed_forward`"):
        ParallelResidual("norm", "attention", "feed_forward").validate(Block())
