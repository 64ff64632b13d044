"""An embedding split by rows of the vocabulary."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles import VocabParallelEmbedding
from fabric_tp.testing.ranks import mesh
from tests.styles.table import SIZES, Example, check, name_of, rows


def tokens(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(SIZES["v"], shape)


EXAMPLE = Example(VocabParallelEmbedding, partial(nn.Embedding, SIZES["v"], SIZES["h"]), make_x=tokens)


@pytest.mark.parametrize("row", rows(VocabParallelEmbedding), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


class ScaledEmbedding(nn.Embedding):
    """As Gemma 3's, with a forward of its own."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.embedding_dim**0.5


@pytest.mark.parametrize("padding", [0, SIZES["v"] // 2, SIZES["v"] - 1, None])
def test_forward_of_a_subclass_and_padding(pool, padding) -> None:
    """The row of the padding, on whichever rank it is, has no gradient; and the scale is not lost."""
    build = partial(ScaledEmbedding, SIZES["v"], SIZES["h"], padding)
    pool(2)(check, Example(VocabParallelEmbedding, build, make_x=tokens), rows(VocabParallelEmbedding)[1])


def refuse_tokens(layout: Layout, wrong: list[list[int]], message: str) -> None:
    module = VocabParallelEmbedding(layout)._apply(nn.Embedding(8, 4), mesh(1, 2)["tensor_parallel"])
    with pytest.raises(ValueError, match=message):
        module(torch.tensor(wrong))


@pytest.mark.parametrize(
    ("layout", "wrong", "message"),
    [
        ("replicate", [[0, 8]], r"must lie in \[0, 8\), but range from 0 to 8"),
        ("replicate", [[-1, 3]], r"must lie in \[0, 8\), but range from -1 to 3"),
        ("sequence", [[0, 1, 2]], r"is 3, and no multiple of tensor_parallel_size=2\..* torch's .* pad the batch to 4"),
    ],
)
def test_refuses_tokens(pool, layout, wrong, message) -> None:
    pool(2)(refuse_tokens, layout, wrong, message)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_refuses_options(option) -> None:
    with pytest.raises(ValueError, match=f"does not support {next(iter(option))}"):
        VocabParallelEmbedding().validate(nn.Embedding(8, 4, **option))


def test_takes_only_an_embedding() -> None:
    with pytest.raises(ValueError, match=r"takes a torch\.nn\.Embedding, and this is a Linear"):
        VocabParallelEmbedding().validate(nn.Linear(4, 4))
