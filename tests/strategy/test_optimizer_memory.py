"""Temporaries of an optimizer's step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fabric_tp._torch import FakeTensorMode
from fabric_tp.strategy.optimizer import ELEMENTWISE, PIECE, local


def test_a_step_without_values() -> None:
    """In which memory is counted; the default's loop would ask for values."""
    with FakeTensorMode():
        parameter = nn.Parameter(torch.randn(4, 4))
        parameter.grad = torch.randn(4, 4)
        optimizer = optim.AdamW([parameter])
        for _ in range(2):
            with local(optimizer):
                optimizer.step()
    assert optimizer.state[parameter]["exp_avg"].shape == (4, 4)


class Temporaries(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make: ``peak`` of those alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        out = operation(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in given | self._known:
                self._known.add(id(storage))
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def temporaries(kind: type[Optimizer], options: dict[str, Any], piece: int | None) -> tuple[int, int, int]:
    """Peak in the second step, bytes of the largest parameter, and of all. Without ``piece``, not on local shards."""
    plain = [nn.Parameter(torch.randn(64, 64)) for _ in range(10)]
    optimizer = kind(plain, lr=1e-2, **options)  # type: ignore[call-arg]
    peak = 0
    for _ in range(2):
        for parameter in plain:
            parameter.grad = torch.randn(64, 64)
        with Temporaries() as tracker:
            if piece is None:
                optimizer.step()
            else:
                with mock.patch("fabric_tp.strategy.optimizer.PIECE", piece), local(optimizer):
                    optimizer.step()
        peak = tracker.peak
    return peak, plain[0].nbytes, sum(p.nbytes for p in plain)


SCALAR_BYTES = 1024


@pytest.mark.parametrize("kind", [optim.AdamW, optim.Adam, optim.SGD])
def test_fused_updates_have_no_temporaries(kind) -> None:
    peak, _, _ = temporaries(kind, {"weight_decay": 0.1}, PIECE)
    assert peak < SCALAR_BYTES


@pytest.mark.parametrize("piece", [1, 2 * 64 * 64 * 4])
def test_foreach_has_temporaries_of_a_piece(piece) -> None:
    peak, largest, _ = temporaries(optim.AdamW, {"foreach": True}, piece)
    assert peak <= max(piece, largest) + SCALAR_BYTES


def test_foreach_of_torch_has_temporaries_of_all_parameters() -> None:
    peak, _, everything = temporaries(optim.AdamW, {"foreach": True}, None)
    assert peak >= everything


@pytest.mark.parametrize("kind", [kind for kind in ELEMENTWISE if kind not in (optim.AdamW, optim.Adam, optim.SGD)])
def test_others_have_temporaries_of_three_parameters(kind) -> None:
    peak, largest, _ = temporaries(kind, {}, 1)
    assert peak <= 3 * largest + SCALAR_BYTES
