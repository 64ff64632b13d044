"""What tests of several styles share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from tests.styles.dropout_runs import train


@pytest.fixture(scope="session")
def one_device(pool) -> Callable[[Callable[[], nn.Module]], dict[str, Tensor]]:
    """Losses and gradients on a mesh of one rank."""
    known: dict[str, dict[str, Tensor]] = {}

    def get(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
        if str(build) not in known:
            known[str(build)] = pool(1)(train, build, {}, (1, 1))
        return known[str(build)]

    return get
