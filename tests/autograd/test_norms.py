"""Norms against plain formulas: outputs, gradients and what they keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fabric_tp.autograd.norms import layer_norm, rms_norm

EPS = 1e-5


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def formula(x: Tensor, weight: Tensor | None, unit_offset: bool) -> Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return normed if weight is None else normed * (weight + 1 if unit_offset else weight)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(unit_offset, dtype) -> None:
    x, weight, grad = random(2, 5, 64, seed=0, dtype=dtype), random(64, seed=1, dtype=dtype), random(2, 5, 64, seed=2)
    expected = formula(x.float(), weight.float(), unit_offset).to(dtype)
    found = rms_norm(x, weight, EPS, unit_offset=unit_offset)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for one, other in zip(
        *(torch.autograd.grad(y, (x, weight), grad.to(dtype)) for y in (found, expected)), strict=True
    ):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_rms_norm_of_torch() -> None:
    x, weight = random(2, 5, 64, seed=0), random(64, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, EPS), F.rms_norm(x, (64,), weight, EPS))
    torch.testing.assert_close(rms_norm(x, None, EPS), F.rms_norm(x, (64,), None, EPS))


@pytest.mark.parametrize("unit_offset", [False, True])
def test_gradients_of_rms_norm_are_derivatives(unit_offset) -> None:
    """With wide differences: it rounds to fp32 inside, as the models' own do."""
    x, weight = random(3, 4, seed=0, dtype=torch.float64), random(4, seed=1, dtype=torch.float64)
    wide = {"eps": 1e-3, "atol": 1e-3, "rtol": 1e-3, "nondet_tol": 0.0}
    assert gradcheck(lambda x, w: rms_norm(x, w, EPS, unit_offset=unit_offset), (x, weight), **wide)
    assert gradcheck(lambda x: rms_norm(x, None, EPS), (x,), **wide)


def test_second_derivatives_of_rms_norm() -> None:
    x, weight = random(3, 8, seed=0), random(8, seed=1)
    found, expected = (
        torch.autograd.grad(
            sum(grad.square().sum() for grad in torch.autograd.grad(y.sin().sum(), (x, weight), create_graph=True)),  # type: ignore[arg-type]
            (x, weight),
        )
        for y in (rms_norm(x, weight, EPS), formula(x, weight, False))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("affine", ["weight and bias", "weight", "neither"])
def test_gradients_of_layer_norm_are_derivatives(affine) -> None:
    x, *rest = (random(*shape, seed=seed, dtype=torch.float64) for seed, shape in enumerate([(3, 4), (4,), (4,)]))
    rest = rest[: {"weight and bias": 2, "weight": 1, "neither": 0}[affine]]

    def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return layer_norm(x, (4,), weight, bias, EPS)

    assert torch.equal(function(x, *rest), F.layer_norm(x, (4,), *rest, eps=EPS))
    assert gradcheck(function, (x, *rest))
    assert gradgradcheck(function, (x, *rest))


def kept(function: object, *inputs: Tensor) -> int:
    """Numbers that are kept for the backward, besides the inputs."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        function(*inputs)  # type: ignore[operator]
    own = {each.data_ptr() for each in inputs}
    assert any(each.data_ptr() in own for each in found)
    return sum(each.numel() for each in found if each.data_ptr() not in own)


def test_keeps_a_number_a_row() -> None:
    x, weight = random(2, 5, 64, seed=0), random(64, seed=1)
    assert kept(lambda x, w: rms_norm(x, w, EPS), x, weight) == 10
    assert kept(lambda x, w: layer_norm(x, (64,), w, None, EPS), x, weight) == 0
