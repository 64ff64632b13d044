"""Linear layers behind a common input: the gradients of one device, and each invariant of :mod:`autograd.linear`."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import fabric_tp
from fabric_tp.autograd import linear as module
from fabric_tp.autograd import shared_input
from fabric_tp.autograd.collectives import Group
from fabric_tp.autograd.linear import linear
from fabric_tp.autograd.norms import rms_norm
from fabric_tp.autograd.shared_input import enter
from fabric_tp.styles import PrepareInput
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.ranks import mesh
from tests.autograd.layers import (
    HIDDEN,
    IN_BETWEEN,
    LENGTH,
    USES,
    WIDTH,
    Layers,
    Operations,
    Use,
    backward,
    both,
    changed_in_place,
    compare,
    one_frozen,
    one_unused,
    one_without_grad,
    random,
    something_else_too,
)
from tests.models import build
from tests.parity import differences_of


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("use", USES)
def test_gradients(pool, use, batch, normed, sequence, times) -> None:
    run = partial(backward, use, times=times)
    pool(2)(compare, run, 1e-6 if normed else 1e-12, batch=batch, normed=normed, sequence=sequence)


def test_is_a_linear_layer() -> None:
    x, biases = random(2, 3, WIDTH, seed=0), [random(HIDDEN, seed=1), random(HIDDEN, seed=2)]
    weights = [random(HIDDEN, WIDTH, seed=3), random(HIDDEN, WIDTH, seed=4)]
    expected = F.linear(x, torch.cat(weights), torch.cat(biases))
    torch.testing.assert_close(linear(x, weights, biases), expected)
    for each in (x, x[0, 0].detach().requires_grad_()):
        assert gradcheck(lambda x, v, w, a, b: linear(x, [v, w], [a, b]), (each, *weights, *biases))


def check_gradients() -> None:
    group = Group.of(mesh(1, 1)["tensor_parallel"])
    inputs = (random(2, LENGTH, WIDTH, seed=0), *(random(HIDDEN, WIDTH, seed=seed) for seed in (1, 2)))

    def function(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        entered = enter(x, group, sequence=True)
        return linear(entered, [first]), linear(entered, [second, first])

    assert gradcheck(function, inputs)


def test_gradients_are_derivatives(pool) -> None:
    """On a group of one rank, whose collectives change nothing."""
    pool(1)(check_gradients)


# The invariants, in the order of the module's docstring


def operations(use: Use, frozen: bool = False, only: slice | None = None) -> list[str]:
    """Of the backward, or of that which only some of the weights need."""
    layers = Layers(Group.of(mesh(1, 2)["tensor_parallel"]))
    weights = [weight.detach() if frozen else weight for weight in layers.weights]
    loss = use(layers.entered, *weights)
    with Operations() as found:
        torch.autograd.grad(loss, layers.weights[only] if only else layers.x)
    return found.names


def order() -> None:
    layers = Layers(Group.of(mesh(1, 2)["tensor_parallel"]))
    first, second = (linear(layers.entered, [weight]) for weight in layers.weights)
    nodes = {"Enter": layers.entered.grad_fn, "A": first.grad_fn, "B": second.grad_fn}
    ran = []
    for name, node in nodes.items():
        node.register_prehook(lambda grads, name=name: ran.append((name, grads[0] is None)))
    (first * second).sum().backward()
    assert ran == [("B", False), ("A", False), ("Enter", True)]


def test_enter_comes_last(pool) -> None:
    pool(2)(order)


def test_the_counter_decides_when_not_what(pool) -> None:
    started = ["gather", "product", "wait", "product", "product", "sum", "product", "wait"]
    assert pool(2)(operations, both) == started
    for use in (one_unused, one_without_grad):
        assert pool(2)(operations, use) == ["gather", "product", "wait", "product", "sum", "wait"]
        pool(2)(compare, partial(backward, use))


class Interruption(Exception):
    pass


def interrupted(layers: Layers) -> None:
    """After the second layer's part of the backward, which comes first."""
    loss = both(layers.entered, *layers.weights)

    def interrupt(grad: Tensor) -> None:
        raise Interruption

    hook = layers.weights[1].register_hook(interrupt)
    with pytest.raises(Interruption):
        loss.backward(retain_graph=True)
    hook.remove()
    loss.backward()


def two_losses(layers: Layers) -> None:
    first, second = (linear(layers.entered, [weight]).sin().sum() for weight in layers.weights)
    first.backward(retain_graph=True)
    second.backward()


@pytest.mark.parametrize(
    "run", [interrupted, two_losses, partial(backward, both, times=3)], ids=["interrupted", "two losses", "three times"]
)
def test_backwards_are_apart(pool, run) -> None:
    pool(2)(compare, run)


def some_weights_first(layers: Layers) -> None:
    loss = both(layers.entered, *layers.weights)
    layers.weights[1].grad = torch.autograd.grad(loss, layers.weights[1], retain_graph=True)[0]
    loss.backward()


def test_without_enter_nothing_is_shared(pool) -> None:
    assert pool(2)(operations, both, only=slice(1)) == ["gather", "wait", "product"]
    assert pool(2)(operations, both, only=slice(2)) == 2 * ["gather", "wait", "product"]
    pool(2)(compare, some_weights_first)


def test_others_go_through_autograd(pool) -> None:
    assert pool(2)(operations, something_else_too).count("sum") == 2
    frozen = ["product"]
    assert pool(2)(operations, one_frozen) == [*frozen, "gather", "product", "sum", "wait", "product", "wait"]
    assert pool(2)(operations, both, frozen=True) == ["product", "product", "sum", "wait"]


def watched(watch: str, layers: Layers) -> None:
    seen: list[Tensor] = []
    if watch == "retain_grad":
        layers.entered.retain_grad()
    else:
        factor = 2 if watch == "hook that changes it" else 1
        layers.entered.register_hook(lambda grad: seen.append(factor * grad) or seen[0])
    backward(both, layers)
    grad = seen[0] if seen else layers.entered.grad
    assert grad is not None
    torch.testing.assert_close(reduced(grad, layers) if layers.group else grad, layers.x.grad)


def reduced(grad: Tensor, layers: Layers) -> Tensor:
    assert layers.group
    grad = grad.clone()
    torch.distributed.all_reduce(grad)
    return grad.chunk(layers.group.size, 1)[layers.group.rank]


@pytest.mark.parametrize("watch", ["hook", "retain_grad", "hook that changes it"])
def test_who_watches_sees_its_gradient(pool, watch) -> None:
    pool(2)(compare, partial(watched, watch))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("use", IN_BETWEEN)
def test_a_node_in_between_makes_a_layer_a_plain_one(pool, use, batch) -> None:
    pool(2)(compare, partial(backward, use), 1e-6, batch=batch, normed=True)


def test_change_in_place_that_torch_refuses_is_refused(pool) -> None:
    with pytest.raises(AssertionError, match="modified inplace"):
        pool(2)(compare, partial(backward, changed_in_place), normed=True, sequence=False)


def test_weights_are_kept_by_reference() -> None:
    weights = [random(HIDDEN, WIDTH, seed=3), random(HIDDEN, WIDTH, seed=4)]
    x = rms_norm(random(2, WIDTH, seed=0), random(WIDTH, seed=1), 1e-5)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(x, weights)
    assert not kept
    with torch.no_grad():
        weights[0].add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def checkpointed(reentrant: bool, layers: Layers) -> None:
    def block(x: Tensor) -> Tensor:
        entered = enter(x * 1, layers.group, sequence=True) if layers.group else x * 1
        return both(entered, *layers.weights)

    loss = checkpoint(block, layers.x * 1, use_reentrant=reentrant)
    loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_enter_saved_is_taken_once(pool, reentrant) -> None:
    pool(2)(compare, partial(checkpointed, reentrant))


def lifetimes() -> None:
    """What is gathered lies in memory of its own for a batch of one, what is summed for a larger one."""
    gathered, part, _, _, _, _, last, wait = range(8)
    for batch, number, needed, freed in ((1, gathered, last, wait), (2, part, last - 1, last)):
        layers = Layers(Group.of(mesh(1, 2)["tensor_parallel"]), batch=batch)
        loss = both(layers.entered, *layers.weights)
        with Operations() as found:
            loss.backward()
        assert number in found.alive[needed]
        assert number not in found.alive[freed]


def test_nothing_whole_outlives_its_use(pool) -> None:
    pool(2)(lifetimes)


def autocast(layers: Layers) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = both(layers.entered, *layers.weights)
    with Operations() as found:
        loss.backward()
    assert all(each.dtype == torch.float32 for each in found.inputs)


def test_gradients_have_their_tensors_dtypes(pool) -> None:
    pool(2)(compare, autocast, 2e-2, dtype=torch.float32)


def second_derivatives(of_weights_only: bool) -> None:
    layers = Layers(Group.of(mesh(1, 2)["tensor_parallel"]))
    loss = both(layers.entered, *layers.weights)
    with pytest.raises(ValueError, match=r"create_graph=True asks for second derivatives.*on one device"):
        torch.autograd.grad(loss, layers.weights if of_weights_only else layers.x, create_graph=True)


@pytest.mark.parametrize("of_weights_only", [True, False])
def test_there_are_no_second_derivatives(pool, of_weights_only) -> None:
    pool(2)(second_derivatives, of_weights_only)


def compiled(layers: Layers) -> None:
    def function(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return both(enter(x, layers.group, sequence=True) if layers.group else x, first, second)

    torch.compiler.reset()
    refuse = mock.Mock(side_effect=AssertionError)
    with mock.patch.object(module._Linear, "apply", refuse), mock.patch.object(shared_input.Enter, "apply", refuse):
        torch.compile(function, backend="aot_eager", fullgraph=True)(layers.x, *layers.weights).backward()


def test_the_compiler_sees_plain_operators(pool) -> None:
    pool(2)(compare, compiled)


def forget_to_sum_input_gradients(model: nn.Module) -> None:
    style = model.get_submodule("transformer.h.1.mlp").parallelized.style  # type: ignore[union-attr]
    assert isinstance(style, PrepareInput)
    style.input_layout = None


def test_a_missing_sum_of_input_gradients_is_noticed(pool) -> None:
    parallelize_fn = fabric_tp.litgpt(sequence_parallel=False)
    model = partial(build, "Llama-3-8B")
    worst = differences_of(pool, model, parallelize_fn, break_model=forget_to_sum_input_gradients)
    assert max(worst.values()) > 10 * TOLERANCE
