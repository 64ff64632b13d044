"""Tensors that are recomputed: who can do it, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fabric_tp.autograd.activations import activated, gated
from fabric_tp.autograd.kept_reductions import _Keep
from fabric_tp.autograd.norms import layer_norm, rms_norm
from fabric_tp.autograd.recompute import producer_of, recompute, recomputed_by_compiler, release, saved

RECOMPUTABLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rms_norm": lambda x, weight: rms_norm(x, weight, 1e-5),
    "rms_norm with unit offset": lambda x, weight: rms_norm(x, weight, 1e-5, unit_offset=True),
    "layer_norm": lambda x, weight: layer_norm(x, (8,), weight, weight, 1e-5),
    "activated": lambda x, weight: activated(x * weight, "gelu_tanh"),
    "gated": lambda x, weight: gated(x, x * weight, "silu"),
    "kept": lambda x, weight: _Keep.apply(x * weight),
}


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator).requires_grad_() for shape in ((3, 8), (8,)))  # type: ignore[return-value]


@pytest.mark.parametrize("name", RECOMPUTABLE)
def test_is_recomputed_bit_by_bit(name) -> None:
    y = RECOMPUTABLE[name](*inputs())
    assert producer_of(y) is y.grad_fn
    assert torch.equal(recompute(producer_of(y)), y)


@pytest.mark.parametrize(
    "change",
    [lambda x: x * 2, lambda x: x.view(-1), lambda x: x.mul_(2), lambda x: x.detach(), lambda x: torch.relu(x)],
)
@pytest.mark.parametrize("name", ["rms_norm", "gated"])
def test_another_tensor_has_another_producer_or_none(name, change) -> None:
    assert producer_of(change(RECOMPUTABLE[name](*inputs()))) is None


@pytest.mark.parametrize("name", sorted(RECOMPUTABLE.keys() - {"kept"}))
def test_a_change_without_grad_is_noticed(name) -> None:
    y = RECOMPUTABLE[name](*inputs())
    with torch.no_grad():
        y.mul_(2)
    assert producer_of(y) is None


def test_what_is_kept_can_have_been_changed_before_and_not_after() -> None:
    x, weight = inputs()
    y = _Keep.apply((x * weight).mul_(2))
    assert torch.equal(recompute(producer_of(y)), y)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified inplace"):
        producer_of(y)


class Product(torch.autograd.Function):
    """Asks twice for what it saved, as several nodes do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = saved(ctx)
        assert saved(ctx)[0] is x
        assert release(ctx)[0] is x
        assert ctx.held is None
        return 2 * grad * x


class AskingFirst(torch.autograd.Function):
    """Takes what the node before it saved, and fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, node: Any) -> Tensor:
        ctx.node = node
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        saved(ctx.node)
        if grad.isnan().any():
            raise ArithmeticError
        return grad, None


def test_saved_tensors_are_taken_once_in_a_backward() -> None:
    x, _ = inputs()
    taken: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: taken.append(t) or t):
        y = Product.apply(x * 1)
        y = AskingFirst.apply(y, y.grad_fn)
    y.sum().backward(retain_graph=True)
    assert len(taken) == 1
    with pytest.raises(ArithmeticError):
        y.backward(torch.full_like(y, torch.nan), retain_graph=True)
    y.sum().backward()  # which does not use what the interrupted one has left
    assert len(taken) == 3


def test_the_compiler_keeps_inputs_only() -> None:
    """What it reads a checkpoint as; without it, the same is computed."""
    x, weight = inputs()
    calls: list[None] = []

    def function(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(None)
        return F.silu(x * weight).exp()

    recomputed_by_compiler(function, x, weight).sum().backward()
    assert len(calls) == 2
    found, x.grad = x.grad, None
    function(x, weight).sum().backward()
    assert torch.equal(found, x.grad)  # type: ignore[arg-type]
