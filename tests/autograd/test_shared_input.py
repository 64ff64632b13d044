"""An input is gathered again before its layers need it: when the gradient of their outputs' sum is there."""

from __future__ import annotations

import time
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fabric_tp
from fabric_tp.autograd.collectives import Group, reduce_scatter
from fabric_tp.autograd.linear import linear
from fabric_tp.autograd.shared_input import gather_early
from fabric_tp.styles import Colwise, Rowwise
from fabric_tp.testing.ranks import mesh
from tests.autograd.layers import LENGTH, Layers, Operations, compare, random

EARLY = ["gather", "wait", "gather", "product", "product", "product", "sum", "wait", "product", "wait"]
"""Of the output's gradient, then of the input, beside three products; then the sum of the input's gradient."""


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).sin())


def of_a_backward(frozen: bool) -> list[str]:
    plan = {"up": Colwise("sequence", regather=True), "down": Rowwise("sequence")}
    model = fabric_tp.from_plan(plan)(MLP(), mesh(1, 2))
    model.up.requires_grad_(not frozen)
    x = torch.randn(1, LENGTH, 8, requires_grad=True)
    loss = model(x * 1).sum()
    with Operations() as found:
        loss.backward()
    return found.names


def test_the_gather_may_begin_early(pool) -> None:
    assert pool(2)(of_a_backward, False) == EARLY
    frozen = ["gather", "wait", "product", "product", "product", "sum", "wait"]
    assert pool(2)(of_a_backward, True) == frozen  # nobody needs the input


def only_some_reach_the_loss(layers: Layers) -> None:
    linear(layers.entered, [layers.weights[1]])
    _finish(layers, linear(layers.entered, [layers.weights[0]]).sin())


def none_reaches_the_loss(layers: Layers) -> None:
    """But something else that took the input; the gather that was begun is waited for by Enter."""
    y = linear(layers.entered, [layers.weights[1]]).detach() * F.linear(layers.entered, layers.weights[0])
    _finish(layers, y)


def twice(layers: Layers) -> None:
    y = sum((linear(layers.entered, [weight]).sin() for weight in layers.weights), torch.zeros(()))
    _finish(layers, y, times=2)


def _finish(layers: Layers, y: Tensor, times: int = 1) -> None:
    if layers.group is not None:
        y = y @ _part(layers.group)
        y = reduce_scatter(y, layers.group, then=gather_early())
        factor = _factor().chunk(layers.group.size, 1)[layers.group.rank]
    else:
        y, factor = y @ _whole(), _factor()
    for index in range(times):
        (y * factor).sum().backward(retain_graph=index < times - 1)


def _whole() -> Tensor:
    return random(12, 8, seed=7).detach()


def _part(group: Group) -> Tensor:
    return _whole().chunk(group.size)[group.rank]


def _factor() -> Tensor:
    return random(1, LENGTH, 8, seed=8).detach()


@pytest.mark.parametrize("run", [only_some_reach_the_loss, none_reaches_the_loss, twice])
def test_gradients(pool, run: Any) -> None:
    pool(2)(compare, run)


def weights_of_a_graph_that_comes_to_no_input() -> list[str]:
    layers = Layers(Group.of(mesh(1, 2)["tensor_parallel"]))
    y = reduce_scatter(linear(layers.entered, [layers.weights[0]]), layers.group, then=gather_early())
    with Operations() as found:
        torch.autograd.grad(y.sum(), layers.weights[0])
    return found.names


def test_without_enter_nothing_is_gathered_early(pool) -> None:
    assert pool(2)(weights_of_a_graph_that_comes_to_no_input) == ["gather", "wait", "gather", "wait", "product"]


def leftovers() -> None:
    """Each sum takes the last input only, and an input is taken once."""
    layers = Layers(Group.of(mesh(1, 2)["tensor_parallel"]))
    assert layers.entered is not None
    assert gather_early() is not None
    assert gather_early() is None
    layers = Layers(Group.of(mesh(1, 2)["tensor_parallel"]))
    assert layers.entered is not None
    node, deadline = weakref.ref(layers.entered.grad_fn), time.monotonic() + 10
    del layers  # and nothing keeps it, but the thread that gathered a moment longer
    while node() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gather_early() is None


def test_an_input_is_taken_once(pool) -> None:
    pool(2)(leftovers)
