"""What cross_entropy and linear_cross_entropy refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

import fabric_tp
from fabric_tp.testing.ranks import mesh
from tests.loss.examples import logits_and_targets, tensor_parallel
from tests.loss.linear_layers import example


def existing(targets: Tensor | None = None, **options: Any) -> Tensor:
    logits, right = logits_and_targets((3, 8, 24))
    return fabric_tp.cross_entropy(logits, right if targets is None else targets, **options)


def linear(targets: Tensor | None = None, **options: Any) -> Tensor:
    (hidden, weight, _), right = example()
    given = {"hidden": hidden, "weight": weight, "targets": right if targets is None else targets, **options}
    return fabric_tp.linear_cross_entropy(**given)


both = pytest.mark.parametrize("loss", [existing, linear])


@both
@pytest.mark.parametrize("wrong", [-1, 24, -101])
def test_target_out_of_range(loss, wrong) -> None:
    _, targets = example()
    targets[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"\[0, 24\) or be ignore_index=-100, but 1 are not, {wrong} for one"):
        loss(targets)


def sharded(targets: Tensor) -> Tensor:
    logits, _ = logits_and_targets((3, 8, 24))
    axis = tensor_parallel(2)
    local = logits.chunk(2, -1)[axis.get_local_rank()]
    return fabric_tp.cross_entropy(DTensor.from_local(local, axis, [Shard(2)], run_check=False), targets)


def refuses_padding_of_the_last_rank() -> None:
    _, targets = example()
    targets[1, 2] = 24
    with pytest.raises(ValueError, match="24 for one"):
        sharded(targets)


def test_target_out_of_range_sharded(pool) -> None:
    pool(2)(refuses_padding_of_the_last_rank)


@pytest.mark.parametrize("shape", [(3, 7), (8, 3), (24,), (3, 8, 24)], ids=str)
def test_targets_of_another_shape(shape) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape('(3, 8, 24)')}.*{re.escape(str(shape))}"):
        existing(torch.zeros(shape, dtype=torch.int64))


def test_targets_of_another_shape_than_hidden_rows() -> None:
    with pytest.raises(ValueError, match=r"Targets of the shape \(3, 8\).*theirs is \(3, 7\)"):
        linear(torch.zeros(3, 7, dtype=torch.int64))


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "average"}, "'average' is not known; it must be 'mean', 'sum' or 'none'"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0.1 must lie in \[0, 1\]"),
        ({"label_smoothing": 1.1}, r"label_smoothing=1.1 must lie in \[0, 1\]"),
    ],
    ids=str,
)
def test_wrong_options(loss, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        loss(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"input_layout": "rows"}, "input_layout='rows' is not known"),
        ({"bias": torch.zeros(5)}, r"\(24, 6\) and its bias \(5,\) do not make a linear layer"),
        ({"weight": torch.zeros(24, 7)}, "do not make a linear layer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_the_linear_layer(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**options)


def refuses(loss: Callable[[Tensor], Tensor], x: Tensor, dim: int, message: str) -> None:
    """Any placement but that of ``dim`` on a mesh of one dimension."""
    last = x.dim() - 1
    wrong = [(tensor_parallel(2), [Replicate()]), (mesh(1, 2), [Replicate(), Shard(dim)])]
    wrong += [(tensor_parallel(2), [Shard(other)]) for other in range(last + 1) if other != dim]
    for on, placements in wrong:
        given = DTensor.from_local(x, on, placements, run_check=False)
        with pytest.raises(ValueError, match=rf"split over the vocabulary, Shard\({dim}\), on the one-dim.*{message}"):
            loss(given)


def refuses_other_placements() -> None:
    logits, _ = logits_and_targets((3, 8, 24))
    refuses(lambda x: fabric_tp.cross_entropy(x, torch.zeros(x.shape[:-1], dtype=torch.int64)), logits, 2, "but is")
    refuses(lambda x: linear(weight=x), example()[0][1], 0, "fused_loss=True")
    refuses(lambda x: linear(bias=x), torch.zeros(24), 0, "fused_loss=True")


def test_wrongly_sharded(pool) -> None:
    pool(2)(refuses_other_placements)
