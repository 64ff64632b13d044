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


class Reads(nn.Module):
    """As a kernel that takes the weights of the layers around it, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(4)), nn.Conv1d(4, 4, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        assert type(self.inner.weight) is Tensor
        return hidden @ self.inner.weight.squeeze(-1) * self.scale


def gradients() -> list[tuple[str, float]]:
    module = Reads()
    nn.init.ones_(module.inner.weight)
    tensor_parallel = mesh(1, 2)["tensor_parallel"]
    Replicated()._apply(module.inner, tensor_parallel)
    module = Unsharded("sequence", reads=("inner",))._apply(module, tensor_parallel)
    module(torch.ones(1, 8, 4)).sum().backward()
    grads = [parameter.grad for parameter in (module.scale, module.inner.weight)]
    return [(str(grad.placements), float(grad.to_local().mean())) for grad in grads]


def test_whole_gradients_of_what_it_reads(pool) -> None:
    assert pool(2)(gradients) == [("(Replicate(),)", 64.0), ("(Replicate(),)", 16.0)]
