"""What surrounds an optimizer's step sees DTensors: hooks, closures, schedulers, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import optim
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fabric_tp.shards import gather_shards
from fabric_tp.strategy.optimizer import local
from tests.strategy.optimizers import parameters_with_gradients, set_gradients, sharded_model


def hooks_see_dtensors() -> None:
    parameters = parameters_with_gradients()
    optimizer = optim.AdamW(parameters, lr=1e-2)
    seen: list[tuple[str, bool, bool]] = []

    def hook(when: str) -> Callable[..., None]:
        def see(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            same = all(p is q for p, q in zip(optimizer.param_groups[0]["params"], parameters, strict=True))
            momenta = [state["exp_avg"] for state in optimizer.state.values()]
            seen.append((when, same, all(isinstance(momentum, DTensor) for momentum in momenta)))

        return see

    optimizer.register_step_pre_hook(hook("before"))
    optimizer.register_step_post_hook(hook("after"))
    with local(optimizer):
        optimizer.register_step_pre_hook(hook("before, registered late"))
        optimizer.register_step_post_hook(hook("after, registered late"))
        optimizer.step()
    whens = ["before", "after", "after, registered late"]
    assert [each for each in seen if each[0] in whens] == [(when, True, True) for when in whens]


def test_hooks_see_dtensors(pool) -> None:
    pool(2)(hooks_see_dtensors)


def nothing_is_left_behind() -> None:
    parameters = parameters_with_gradients()
    optimizer = optim.AdamW(parameters, lr=1e-2)
    list_, group, state = optimizer.param_groups, optimizer.param_groups[0], optimizer.state
    options = {key: value for key, value in group.items() if key != "params"}
    gradients = [p.grad for p in parameters]
    with local(optimizer):
        optimizer.step()
    assert optimizer.param_groups is list_
    assert list_[0] is group
    assert optimizer.state is state
    assert {key: value for key, value in group.items() if key != "params"} == options
    assert all(p.grad is gradient for p, gradient in zip(parameters, gradients, strict=True))
    assert set(state) == set(parameters)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_nothing_is_left_behind(pool) -> None:
    pool(2)(nothing_is_left_behind)


def state_stays_the_same_object() -> None:
    optimizer = optim.AdamW(parameters_with_gradients(), lr=1e-2)
    with local(optimizer):
        optimizer.step()
        before = [id(value) for state in optimizer.state.values() for value in state.values()]
        optimizer.step()
    assert [id(value) for state in optimizer.state.values() for value in state.values()] == before


def test_state_stays_the_same_object(pool) -> None:
    pool(2)(state_stays_the_same_object)


def autograd_notices_the_update() -> None:
    parameter = parameters_with_gradients()[0]
    optimizer = optim.AdamW([parameter], lr=1e-2)
    before = parameter._version
    with local(optimizer):
        optimizer.step()
    assert parameter._version > before


def test_autograd_notices_the_update(pool) -> None:
    pool(2)(autograd_notices_the_update)


class Interrupted(Exception):
    pass


def interrupted_closure() -> float:
    raise Interrupted


def a_step_that_raises(in_closure: bool) -> None:
    parameters = parameters_with_gradients()
    optimizer = optim.AdamW(parameters, lr=1e-2)
    broken = mock.patch("torch.optim.adam.adam", side_effect=Interrupted)
    with pytest.raises(Interrupted), broken, local(optimizer):
        optimizer.step(interrupted_closure if in_closure else None)
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], parameters, strict=True))
    assert all(isinstance(state["exp_avg"], DTensor) for state in optimizer.state.values())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("in_closure", [True, False], ids=["closure", "step"])
def test_all_is_put_back_after_an_exception(pool, in_closure) -> None:
    pool(2)(a_step_that_raises, in_closure)


def closures(positional: bool) -> None:
    with_closure, without = parameters_with_gradients(), parameters_with_gradients()
    gradients = [p.grad for p in with_closure]
    optimizer = optim.AdamW(with_closure, lr=1e-2)
    optimizer.zero_grad()

    def closure() -> float:
        assert all(isinstance(p, DTensor) for p in optimizer.param_groups[0]["params"])
        for parameter, gradient in zip(with_closure, gradients, strict=True):
            parameter.grad = gradient
        return 3.0

    reference = optim.AdamW(without, lr=1e-2)
    for _ in range(2):
        with local(optimizer):
            assert (optimizer.step(closure) if positional else optimizer.step(closure=closure)) == 3.0
        with local(reference):
            reference.step()
    for parameter, expected in zip(with_closure, without, strict=True):
        assert torch.equal(parameter.to_local(), expected.to_local())  # type: ignore[attr-defined]


@pytest.mark.parametrize("positional", [True, False])
def test_a_closure_computes_on_dtensors(pool, positional) -> None:
    pool(2)(closures, positional)


def schedulers() -> None:
    parameters = parameters_with_gradients()
    optimizer = optim.SGD(parameters, lr=1.0)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)
    start = [p.detach().to_local().clone() for p in parameters]  # type: ignore[attr-defined]
    for _ in range(2):
        with local(optimizer):
            optimizer.step()
        scheduler.step()
    for parameter, first in zip(parameters, start, strict=True):
        torch.testing.assert_close(parameter.detach().to_local(), first - 1.1 * parameter.grad.to_local())  # type: ignore[attr-defined, union-attr]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_schedulers_set_the_learning_rate(pool) -> None:
    pool(2)(schedulers)


def state_dict_round_trip() -> None:
    one, other = parameters_with_gradients(), parameters_with_gradients()
    first, second = optim.AdamW(one, lr=1e-2), optim.AdamW(other, lr=1e-2)
    with local(first):
        first.step()
    second.load_state_dict(deepcopy(first.state_dict()))  # which torch does not copy
    for parameter, copy in zip(one, other, strict=True):
        copy.data.to_local().copy_(parameter.data.to_local())  # type: ignore[attr-defined]
    for optimizer in (first, second):
        with local(optimizer):
            optimizer.step()
    for parameter, copy in zip(one, other, strict=True):
        assert torch.equal(parameter.to_local(), copy.to_local())  # type: ignore[attr-defined]
    with local(second):
        second.step()
    second.step()  # and on DTensors again


def test_state_dict(pool) -> None:
    pool(2)(state_dict_round_trip)


def train_and_save(sizes: tuple[int, int], path: Path) -> None:
    model = sharded_model(sizes)
    parameters = list(model.parameters())
    optimizer = optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2)
    for step in range(3):
        set_gradients(parameters, step, every=True)
        with local(optimizer):
            optimizer.step()
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=path)


def load_and_train(sizes: tuple[int, int], path: Path) -> list[float]:
    """Sums over the weights after another step."""
    model = sharded_model(sizes)
    parameters = list(model.parameters())
    optimizer = optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    set_gradients(parameters, 3, every=True)
    with local(optimizer):
        optimizer.step()
    return [float(gather_shards(p).double().abs().sum()) for p in parameters]


def test_a_checkpoint_moves_to_other_meshes(pool, tmp_path) -> None:
    pool(4)(train_and_save, (2, 2), tmp_path)
    expected = pool(4)(load_and_train, (2, 2), tmp_path)
    for sizes in [(1, 2), (2, 1)]:
        assert pool(2)(load_and_train, sizes, tmp_path) == pytest.approx(expected, rel=1e-9)
