"""Linear layers behind a common input: the gradients of one device, in every way to use the input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import fabric_tp
from fabric_tp.autograd.collectives import Group
from fabric_tp.autograd.linear import enter, linear
from fabric_tp.autograd.norms import rms_norm
from fabric_tp.autograd.recompute import maker_of
from fabric_tp.styles import PrepareInput
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.ranks import mesh
from tests.models import build
from tests.parity import differences_of

HIDDEN, WIDTH, LENGTH = 6, 8, 4

Use = Callable[[Tensor, Tensor, Tensor], Tensor]


def both(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return linear(x, [first]).square().sum() + linear(x, [second]).sin().sum()


def parts(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return linear(x, [first, second]).square().sum()


def one_unused(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    linear(x, [second])
    return linear(x, [first]).square().sum()


def something_else_too(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return both(x, first, second) + (x.square() * first.sum(0)).sum()


def changed_in_place(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    before = linear(x, [first]).square().sum()
    return before + linear(x.mul_(2), [second]).sin().sum()


def one_frozen(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return both(x, first, second.detach())


USES = [both, parts, one_unused, something_else_too, one_frozen]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(use: Use, batch: int, normed: bool, group: Group | None, sequence: bool, times: int) -> list[Tensor]:
    """Of input and weights; with a group, of this rank's part of them."""
    x, weight = random(batch, LENGTH, WIDTH, seed=0), random(WIDTH, seed=1)
    weights = [random(2 * HIDDEN, WIDTH, seed=seed) for seed in (2, 3)]
    entered = x
    if group:
        x = x.detach().chunk(group.size if sequence else 1, 1)[group.rank if sequence else 0].requires_grad_()
        weights = [w.detach().chunk(group.size)[group.rank].requires_grad_() for w in weights]
        entered = rms_norm(x, weight.detach(), 1e-5) if normed else x * 1
        entered = enter(entered, group, sequence=sequence)
    else:
        entered = rms_norm(x, weight.detach(), 1e-5) if normed else x * 1
    loss = use(entered, *weights)
    for _ in range(times - 1):
        loss.backward(retain_graph=True)
    loss.backward()
    return [tensor.grad if tensor.grad is not None else torch.zeros_like(tensor) for tensor in (x, *weights)]


def compare(use: Use, batch: int, normed: bool, sequence: bool, times: int) -> None:
    group = Group.of(mesh(1, 2)["tensor_parallel"])
    expected = gradients(use, batch, normed, None, sequence, times)
    found = gradients(use, batch, normed, group, sequence, times)
    if sequence:
        expected[0] = expected[0].chunk(group.size, 1)[group.rank]
    expected[1:] = [grad.chunk(group.size)[group.rank] for grad in expected[1:]]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 if normed else 1e-12)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("use", USES)
def test_gradients(pool, use, batch, normed, sequence, times) -> None:
    pool(2)(compare, use, batch, normed, sequence, times)


@pytest.mark.parametrize("batch", [1, 2])
def test_input_that_was_changed_in_place_is_not_made_again(pool, batch) -> None:
    pool(2)(compare, changed_in_place, batch, True, True, 1)


def test_change_in_place_that_torch_refuses_is_refused(pool) -> None:
    with pytest.raises(AssertionError, match="modified inplace"):
        pool(2)(compare, changed_in_place, 1, True, False, 1)


def test_is_a_linear_layer() -> None:
    x, biases = random(2, 3, WIDTH, seed=0), [random(HIDDEN, seed=1), random(HIDDEN, seed=2)]
    weights = [random(HIDDEN, WIDTH, seed=3), random(HIDDEN, WIDTH, seed=4)]
    expected = torch.nn.functional.linear(x, torch.cat(weights), torch.cat(biases))
    torch.testing.assert_close(linear(x, weights, biases), expected)
    assert gradcheck(lambda x, v, w, a, b: linear(x, [v, w], [a, b]), (x, *weights, *biases))


def test_keeps_neither_input_nor_whole_weight() -> None:
    weights = [random(HIDDEN, WIDTH, seed=3), random(HIDDEN, WIDTH, seed=4)]
    x = rms_norm(random(2, WIDTH, seed=0), random(WIDTH, seed=1), 1e-5)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x, weights)
    assert not kept


def test_a_changed_weight_is_noticed() -> None:
    weights = [random(HIDDEN, WIDTH, seed=3), random(HIDDEN, WIDTH, seed=4)]
    y = linear(random(2, WIDTH, seed=0), weights)
    with torch.no_grad():
        weights[0].add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_only_what_made_a_tensor_makes_it_again() -> None:
    x = rms_norm(random(2, WIDTH, seed=0), random(WIDTH, seed=1), 1e-5)
    assert maker_of(x) is x.grad_fn
    assert maker_of(x * 2) is None
    assert maker_of(x.view(-1)) is None
    assert maker_of(x.mul_(2)) is None


def forget_to_sum_input_gradients(model: torch.nn.Module) -> None:
    style = model.get_submodule("transformer.h.1.mlp").parallelized.style  # type: ignore[union-attr]
    assert isinstance(style, PrepareInput)
    style.input_layout = None


def test_a_missing_sum_of_input_gradients_is_noticed(pool) -> None:
    parallelize_fn = fabric_tp.litgpt(sequence_parallel=False)
    model = partial(build, "Llama-3-8B")
    worst = differences_of(pool, model, parallelize_fn, break_model=forget_to_sum_input_gradients)
    assert max(worst.values()) > 10 * TOLERANCE
