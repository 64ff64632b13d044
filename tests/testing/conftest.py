from functools import partial

import pytest

from fabric_tp.testing import __main__, parity
from fabric_tp.testing.ranks import Ranks


@pytest.fixture
def forked_ranks(monkeypatch, forks) -> None:
    """Processes are forked from those that have imported everything."""
    for module in (__main__, parity):
        monkeypatch.setattr(module, "Ranks", partial(Ranks, start=forks))
