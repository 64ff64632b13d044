"""Compares a parallelized model with the same model on one device: output, gradients, clipping, weights after steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

import fabric_tp
from fabric_tp.shards import gather_shards
from fabric_tp.styles.fused import fused_parameters
from tests.models import LENGTH, VOCABULARY, build
from tests.pool import mesh

TOLERANCE = 2e-5
"""Largest allowed difference in fp32, relative to the largest value of the tensor."""

MAX_NORM = 0.05

Break = Callable[[nn.Module], None]


def assert_parity(
    name: str,
    factory: str,
    options: dict[str, Any],
    sizes: tuple[int, int],
    break_model: Break | None = None,
) -> None:
    """Run on every rank of a mesh of these (data-parallel, tensor-parallel) sizes."""
    worst = differences(name, factory, options, sizes, break_model)
    wrong = {what: f"{error:.1e}" for what, error in worst.items() if not error <= TOLERANCE}
    assert not wrong, wrong


def differences(
    name: str,
    factory: str,
    options: dict[str, Any],
    sizes: tuple[int, int],
    break_model: Break | None = None,
) -> dict[str, float]:
    reference = build(name)
    model = copy.deepcopy(reference)
    parallelize: Callable[[nn.Module, Any], nn.Module] = getattr(fabric_tp, factory)(**options)
    model = parallelize(model, mesh(*sizes))
    if break_model:
        break_model(model)
    if name == "feed_forward":
        return {
            **_output_gradient(reference, model, sizes),
            **_steps(reference, model, sizes, _regression, _regression),
        }
    return {
        **_output_gradient(reference, model, sizes),
        **_steps(reference, model, sizes, _one_device_loss, _parallel_loss),
    }


def _inputs(reference: nn.Module, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets, of which each row ignores as many as any other."""
    if hasattr(reference, "w1"):
        shape = (batch, LENGTH, reference.w1.in_features)  # type: ignore[union-attr]
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    tokens = torch.randint(VOCABULARY, (batch, LENGTH), generator=generator)
    targets = torch.randint(VOCABULARY, (batch, LENGTH), generator=generator)
    targets[:, ::5] = -100
    return tokens, targets


def _regression(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target)


def _one_device_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def _parallel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return fabric_tp.cross_entropy(logits, targets)


def _local_rows(tensor: Tensor, sizes: tuple[int, int]) -> Tensor:
    return tensor.chunk(sizes[0])[mesh(*sizes).get_local_rank("data_parallel")]


def _output_gradient(reference: nn.Module, model: nn.Module, sizes: tuple[int, int]) -> dict[str, float]:
    """Output and gradients for a random gradient of the output, which no symmetry of a loss can hide."""
    generator = torch.Generator().manual_seed(1)
    x, _ = _inputs(reference, 2 * sizes[0], generator)
    expected = reference(x)
    grad = torch.randn(expected.shape, generator=generator)
    (expected * grad).sum().backward()
    output, grad = model(_local_rows(x, sizes)), _local_rows(grad, sizes) * sizes[0]  # FSDP2 averages
    if isinstance(output, DTensor):
        size, rank = output.device_mesh.size(), output.device_mesh.get_local_rank()
        output, grad = output.to_local(grad_placements=[Shard(2)]), grad.chunk(size, -1)[rank]
        expected = expected.chunk(size, -1)[rank]
    (output * grad).sum().backward()
    worst = {"output": _error(output, _local_rows(expected, sizes))}
    worst |= {f"{name} for a random output gradient": error for name, error in _gradients(reference, model).items()}
    for each in (reference, model):
        each.zero_grad()
    return worst


def _steps(
    reference: nn.Module,
    model: nn.Module,
    sizes: tuple[int, int],
    reference_loss: Callable[[Tensor, Tensor], Tensor],
    parallel_loss: Callable[[Tensor, Tensor], Tensor],
    steps: int = 3,
    accumulate: Sequence[bool] = (True, False),
) -> dict[str, float]:
    """Three AdamW steps of two micro-batches with clipping; the first of each two does not synchronise gradients."""
    generator = torch.Generator().manual_seed(2)
    reference_optimizer, optimizer = (torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-5) for m in (reference, model))
    worst: dict[str, float] = {}
    for step in range(steps):
        for accumulating in accumulate:
            x, y = _inputs(reference, 2 * sizes[0], generator)
            expected = reference_loss(reference(x), y) / len(accumulate)
            expected.backward()
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(not accumulating)
            loss = parallel_loss(model(_local_rows(x, sizes)), _local_rows(y, sizes)) / len(accumulate)
            loss.backward()
            mean = loss.detach().clone()
            dist.all_reduce(mean, group=mesh(*sizes).get_group("data_parallel"))
            worst[f"loss of step {step}"] = _error(mean / sizes[0], expected)
        if step == 0:
            worst |= {f"gradient of {name}": error for name, error in _gradients(reference, model).items()}
        expected_norm = nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM)
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        assert expected_norm > MAX_NORM, "clipping must do something"
        worst[f"norm of step {step}"] = _error(norm.full_tensor(), expected_norm)  # type: ignore[attr-defined]
        for each in (reference_optimizer, optimizer):
            each.step()
            each.zero_grad()
    expected_weights = dict(reference.named_parameters())
    for name, weight in _whole(model, lambda parameter: parameter).items():
        worst[f"{name} after {steps} steps"] = _error(weight, expected_weights[name])
    return worst


def _gradients(reference: nn.Module, model: nn.Module) -> dict[str, float]:
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert isinstance(parameter.grad, DTensor), name
        assert parameter.grad.placements == parameter.placements, name
    gathered = _whole(model, lambda parameter: parameter.grad)
    return {name: _error(gathered[name], parameter.grad) for name, parameter in reference.named_parameters()}


def _whole(model: nn.Module, of: Callable[[nn.Parameter], Any]) -> dict[str, Tensor]:
    """Gathered tensors by the names of the unparallelized model."""
    fused = fused_parameters(model)
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(fused.get(name, name), []).append(gather_shards(of(parameter)))
    return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in parts.items()}


def _error(value: Tensor, expected: Tensor | None) -> float:
    assert expected is not None
    assert value.shape == expected.shape, (value.shape, expected.shape)
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((value - expected).abs().max() / scale).item()
