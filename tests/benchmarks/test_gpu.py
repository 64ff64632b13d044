"""What ``python -m benchmarks.gpu`` compares, where there is a GPU; on the CPU that the comparison itself works."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import WAYS, shared_card


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.sweep),
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_two_ranks_that_share_a_device_compute_what_one_does(device) -> None:
    """By symmetric memory too."""
    found = shared_card(device)
    assert found.keys() == WAYS.keys()
    assert all(worst["loss"] < 1e-5 and worst["gradients"] < 2e-5 for worst in found.values()), found
