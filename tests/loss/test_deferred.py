"""Logits of fused_loss=True look like logits, stay deferred as long as they can, and are right when computed."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fabric_tp
from fabric_tp.loss.deferred import DeferredLogits
from fabric_tp.shards import gather_shards
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import LENGTH, VOCABULARY
from tests.loss.models import MODELS, logits_of_one_device, model_of, tokens


def looks_like_logits() -> None:
    with mock.patch.object(DeferredLogits, "compute", side_effect=AssertionError):
        logits = model_of()(tokens())
        assert isinstance(logits, DeferredLogits)
        assert logits.shape == (2, LENGTH, VOCABULARY)
        assert (logits.dim(), logits.size(-1), len(logits)) == (3, VOCABULARY, 2)
        assert logits.numel() == 2 * LENGTH * VOCABULARY
        assert logits.dtype == torch.float32
        assert logits.device == torch.device("cpu")
        assert logits.is_floating_point()
        assert logits.requires_grad
        assert repr(logits) == f"DeferredLogits(shape=(2, {LENGTH}, {VOCABULARY}), dtype=torch.float32)"
        with torch.no_grad():
            assert not model_of()(tokens()).requires_grad


def test_looks_like_logits_without_being_computed(pool) -> None:
    pool(2)(looks_like_logits)


LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": lambda logits: logits[..., :-1, :],
    "one position": lambda logits: logits[:, -1],
    "one sequence": lambda logits: logits[1],
    "view": lambda logits: logits.view(-1, VOCABULARY),
    "reshape": lambda logits: logits.reshape(-1, logits.size(-1)),
    "flatten": lambda logits: logits.flatten(0, 1),
    "shifted, contiguous, view": lambda logits: logits[:, :-1].contiguous().view(-1, VOCABULARY),
    "float": lambda logits: logits.float(),
    "double": lambda logits: logits.to(torch.float64),
}

COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "some columns": lambda logits: logits[..., :5],
    "chosen rows": lambda logits: logits[:, torch.tensor([3, 1, 1])],
    "all in one": lambda logits: logits.flatten(),
    "sum": lambda logits: logits.sum(),
    "method": lambda logits: logits.argmax(-1),
    "function": lambda logits: torch.softmax(logits, -1),
    "second argument": lambda logits: torch.ones(VOCABULARY) + logits,
    "transpose": lambda logits: logits.mT,
    "functional": lambda logits: F.log_softmax(logits, dim=-1),
}


def stays_deferred(name: str) -> None:
    logits = LAZY[name](model_of(loss_parallel=False)(tokens()))
    assert isinstance(logits, DeferredLogits)
    expected = LAZY[name](logits_of_one_device("Llama 3"))
    assert (logits.shape, logits.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(logits.compute(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAZY)
def test_stays_deferred(pool, name) -> None:
    pool(2)(stays_deferred, name)


def gets_computed(name: str) -> None:
    result = COMPUTED[name](model_of(loss_parallel=False)(tokens()))
    assert type(result) is Tensor
    torch.testing.assert_close(result, COMPUTED[name](logits_of_one_device("Llama 3")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", COMPUTED)
def test_anything_else_gets_real_logits(pool, name) -> None:
    pool(2)(gets_computed, name)


def computed_is_sharded() -> None:
    logits = model_of()(tokens()) + 0
    assert isinstance(logits, DTensor)
    torch.testing.assert_close(logits.full_tensor(), logits_of_one_device("Llama 3"), rtol=1e-4, atol=1e-4)


def test_real_logits_are_sharded_under_loss_parallel(pool) -> None:
    pool(2)(computed_is_sharded)


def loss_and_gradient(model: nn.Module, change: Callable[[Tensor], Tensor], reduction: str) -> list[Tensor]:
    model.zero_grad()
    logits = change(model(tokens()))
    targets = torch.randint(VOCABULARY, logits.shape[:-1], generator=torch.Generator().manual_seed(1))
    targets.flatten()[::3] = -100
    loss = fabric_tp.cross_entropy(logits, targets, reduction=reduction, label_smoothing=0.1)  # type: ignore[arg-type]
    loss.sum().backward()
    gradients = [gather_shards(p.grad) for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients]


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "softcapped": lambda logits: torch.tanh(logits / 3) * 3,
    "capped by a negative number": lambda logits: torch.tanh(logits / -3) * -3,
    "capped and scaled": lambda logits: torch.tanh(logits / 3) * 2,
    "doubled": lambda logits: logits * 2,
}


def loss_of_changed(name: str, change: str, reduction: str, computed: int) -> None:
    """The loss of logits after a change, computed so many times."""
    changes = {**LAZY, **ELEMENTWISE, "": lambda x: x}
    unfused = fabric_tp.auto()(MODELS[name](), mesh(1, 2))
    model = model_of(name)
    with mock.patch.object(DeferredLogits, "compute", autospec=True, side_effect=DeferredLogits.compute) as compute:
        fused = loss_and_gradient(model, changes[change], reduction)
    assert compute.call_count == computed
    for value, expected in zip(fused, loss_and_gradient(unfused, changes[change], reduction), strict=True):
        torch.testing.assert_close(value.to(expected.dtype), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("change", ["", "shifted", "one position", "view", "softcapped", "float"])
def test_loss_of_deferred(pool, change, reduction) -> None:
    pool(2)(loss_of_changed, "Llama 3", change, reduction, 0)


def test_softcapping_of_the_model_is_part_of_the_loss(pool) -> None:
    pool(2)(loss_of_changed, "Gemma 2, softcapping", "", "mean", 0)


@pytest.mark.parametrize("change", ["capped by a negative number", "capped and scaled", "doubled"])
def test_loss_of_logits_changed_otherwise_is_that_of_real_ones(pool, change) -> None:
    pool(2)(loss_of_changed, "Llama 3", change, "mean", 1)


def hooks_are_called() -> None:
    model, seen = model_of(), []
    logits = model(tokens())
    logits.register_hook(seen.append)
    fabric_tp.cross_entropy(logits[:, :-1], tokens()[:, 1:]).backward()
    assert seen == [None]


def test_hooks_on_deferred_logits_are_called(pool) -> None:
    """As FSDP2 and Fabric need it, whatever view of them the loss was of."""
    pool(2)(hooks_are_called)


def full_backward_hook_sees_gradients() -> None:
    model, seen = model_of(loss_parallel=False), []
    model.register_full_backward_hook(lambda module, grad_input, grad_output: seen.extend(grad_output))  # type: ignore[arg-type]
    logits = model(tokens())
    assert type(logits) is Tensor
    fabric_tp.cross_entropy(logits, tokens()).backward()
    assert seen[0].shape == logits.shape
    assert seen[0].abs().sum() > 0


def test_full_backward_hooks_get_the_gradient_of_real_logits(pool) -> None:
    pool(2)(full_backward_hook_sees_gradients)
