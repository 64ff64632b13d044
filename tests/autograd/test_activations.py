"""Activations: the outputs of torch's, gradients that are derivatives, and nothing kept but inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from fabric_tp.autograd.activations import ACTIVATIONS, activated, gated

TORCHS = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_all_are_checked() -> None:
    assert TORCHS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TORCHS)
def test_is_torchs(name, dtype) -> None:
    x, up = random(4, 32, seed=0, dtype=dtype), random(4, 32, seed=1, dtype=dtype)
    assert torch.equal(activated(x, name), TORCHS[name](x))
    assert torch.equal(gated(x, up, name), TORCHS[name](x) * up)


@pytest.mark.parametrize("name", TORCHS)
def test_gradients_are_derivatives(name) -> None:
    x, up = random(3, 4, seed=0), random(3, 4, seed=1)
    assert gradcheck(lambda x: activated(x, name), (x,))
    assert gradcheck(lambda x, up: gated(x, up, name), (x, up))


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_second_derivatives(name) -> None:
    x, up = random(3, 4, seed=0), random(3, 4, seed=1)
    assert gradgradcheck(lambda x: activated(x, name), (x,))
    assert gradgradcheck(lambda x, up: gated(x, up, name), (x, up))


def test_second_derivatives_that_torch_does_not_have_are_refused() -> None:
    x = random(3, 4, seed=0)
    (grad,) = torch.autograd.grad(activated(x, "silu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="silu_backward is not implemented"):
        grad.sum().backward()


def test_keeps_inputs_only() -> None:
    x, up = random(4, 32, seed=0), random(4, 32, seed=1)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        activated(x, "silu")
        gated(x, up, "silu")
    assert {each.data_ptr() for each in kept} == {x.data_ptr(), up.data_ptr()}
    assert len(kept) == 3
