from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fabric_tp
from fabric_tp.testing import assert_replicas_in_sync
from fabric_tp.testing.ranks import mesh
from tests.models import build

NAME = "transformer.h.1.norm_2.weight"


def checked(sizes: tuple[int, int], changed: bool) -> None:
    model = fabric_tp.litgpt()(build("Llama-3-8B"), mesh(*sizes))
    if changed and dist.get_rank() == 1:
        with torch.no_grad():
            model.get_parameter(NAME)._local_tensor[0] += 1e-3  # type: ignore[attr-defined]
    if not changed:
        assert_replicas_in_sync(model)
        return
    with pytest.raises(AssertionError, match=rf"Copies of 1 parameters differ between ranks: {NAME} by up to 1\.0e-03"):
        assert_replicas_in_sync(model)


@pytest.mark.parametrize("changed", [False, True])
def test_one_copy_changed(pool, changed) -> None:
    pool(2)(checked, (1, 2), changed)


def test_with_data_parallelism(pool) -> None:
    pool(4)(checked, (2, 2), False)
