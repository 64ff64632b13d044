"""A parameter as a DTensor: which rows a rank has, of lengths that the ranks divide and that they do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

from fabric_tp.styles.parameters import check_linear, distribute_parameter, own_parameters
from fabric_tp.testing.ranks import mesh


def rows_of(length: int) -> None:
    tensor_parallel = mesh(1, 4)["tensor_parallel"]
    whole = torch.arange(2.0 * length).view(length, 2)
    parameter = distribute_parameter(nn.Parameter(whole, requires_grad=False), Shard(0), tensor_parallel)
    local = parameter.to_local()  # type: ignore[attr-defined]
    step = -(-length // 4)
    rank = tensor_parallel.get_local_rank()
    torch.testing.assert_close(local, whole[rank * step : (rank + 1) * step])
    assert parameter.shape == whole.shape
    assert not parameter.requires_grad
    assert local.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    torch.testing.assert_close(parameter.full_tensor(), whole)  # type: ignore[attr-defined]


@pytest.mark.parametrize("length", [8, 7, 5])
def test_each_rank_has_the_next_rows(pool, length) -> None:
    """Of five rows the last rank has none."""
    pool(4)(rows_of, length)


def test_names_of_what_a_module_holds_itself() -> None:
    assert list(own_parameters(nn.Linear(2, 2, bias=False))) == ["weight"]
    assert list(own_parameters(nn.Sequential(nn.Linear(2, 2)))) == []


def test_only_linear_layers() -> None:
    check_linear("Rowwise", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Rowwise takes a torch\.nn\.Linear, and this is a Embedding\."):
        check_linear("Rowwise", nn.Embedding(2, 2))
