"""Compares a parallelized model with the same model on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_leaves, tree_map

from fabric_tp.loss import cross_entropy
from fabric_tp.loss.deferred import DeferredLogits
from fabric_tp.parallelize.expected import first_tensor
from fabric_tp.shards import gather_shards
from fabric_tp.styles.fused_colwise import FusedPart, fused_parameters
from fabric_tp.testing.ranks import Ranks, mesh

TOLERANCE = 2e-5
"""Largest difference allowed in fp32, relative to the largest value of the tensor."""

BuildModel = Callable[[], nn.Module]
LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Report:
    """Differences from one device, each relative to the largest value of the tensor that differs."""

    differences: dict[str, float]
    tolerance: float = TOLERANCE

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.differences.items(), key=lambda item: (item[1] != item[1], item[1]))  # nan is worst

    @property
    def equal(self) -> bool:
        return all(difference <= self.tolerance for difference in self.differences.values())

    def __str__(self) -> str:
        name, difference = self.worst
        verdict = "equal to one device" if self.equal else "NOT equal to one device"
        return f"{verdict}: of {len(self.differences)} tensors the worst is {name}, {difference:.1e} off"


def check_parity(
    build_model: BuildModel,
    parallelize_fn: Callable[[nn.Module, Any], nn.Module],
    inputs: Any,
    loss_fn: LossFn,
    *,
    tensor_parallel_size: int = 2,
    data_parallel_size: int = 1,
    steps: int = 3,
    tolerance: float = TOLERANCE,
) -> Report:
    """Train a model for a few steps in parallel, on processes on the CPU that this starts, and on one device.

    Compares the output, the loss, every gradient for a random gradient of the output and for the loss, the clipped
    gradient norm, and the weights after ``steps`` steps of AdamW with clipping. Zero biases and norm weights of one
    hide mistakes: let ``build_model`` give them other values.

    Args:
        build_model: Makes the model, small enough for the CPU, with the same values each time. A function of a module,
            since processes import it.
        parallelize_fn: What you give to ``ModelParallelStrategy``: ``fabric_tp.auto()``.
        inputs: For the model: a tensor, a tuple of arguments, or a dict of keyword arguments, with the batch in the
            first dimension of each tensor.
        loss_fn: From the model's output and the inputs to a scalar, a mean over the batch, such as
            :func:`next_token_loss`. It sees vocabulary-sharded logits; :func:`fabric_tp.cross_entropy` takes them.
        tensor_parallel_size: Ranks that share the model.
        data_parallel_size: Ranks that share the batch, which they must divide.
        steps: Steps of the optimizer.
        tolerance: The largest difference allowed, relative to the largest value of the tensor that differs.

    Raises:
        AssertionError: Something differs by more, or a rank failed.
        ValueError: The model cannot be parallelized so.

    Example::

        tokens = torch.randint(vocabulary, (2, 16))
        print(check_parity(build_model, fabric_tp.auto(), tokens, next_token_loss, tensor_parallel_size=2))
    """
    if check := getattr(parallelize_fn, "check", None):
        check(build_model(), tensor_parallel_size=tensor_parallel_size)
    ranks = Ranks(data_parallel_size * tensor_parallel_size)
    try:
        arguments = (build_model, parallelize_fn, inputs, loss_fn, (data_parallel_size, tensor_parallel_size), steps)
        report = Report(ranks(compare, *arguments), tolerance)
    finally:
        ranks.stop()
    if not report.equal:
        raise AssertionError(str(report))
    return report


def next_token_loss(output: Any, inputs: Any) -> Tensor:
    """Cross-entropy of each position's logits with the next token; every fifth target is left out."""
    logits = output if isinstance(output, Tensor) else output.logits
    tokens = tree_leaves(inputs)[0]
    targets = torch.cat((tokens[:, 1:], tokens[:, :1]), dim=1)
    targets[:, ::5] = -100
    return cross_entropy(logits, targets)


def compare(
    build_model: BuildModel,
    parallelize_fn: Callable[[nn.Module, Any], nn.Module],
    inputs: Any,
    loss_fn: LossFn,
    sizes: tuple[int, int],
    steps: int,
    break_model: Callable[[nn.Module], None] | None = None,
) -> dict[str, float]:
    """Relative differences by name on rank 0, which trains the reference as well.

    To be called on every rank of a mesh of these (data-parallel, tensor-parallel) sizes.
    """
    model = build_model()
    reference = copy.deepcopy(model) if dist.get_rank() == 0 else None
    model = parallelize_fn(model, mesh(*sizes))
    if break_model:
        break_model(model)
    differences = _random_output_gradient(reference, model, inputs, sizes)
    for each in _both(reference, model):
        each.zero_grad()
    return differences | _train(reference, model, inputs, loss_fn, sizes, steps)


def _both(reference: nn.Module | None, model: nn.Module) -> tuple[nn.Module, ...]:
    return (reference, model) if reference is not None else (model,)


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _mine(inputs: Any, sizes: tuple[int, int]) -> Any:
    """This data-parallel rank's rows."""
    rank = mesh(*sizes).get_local_rank("data_parallel")
    return tree_map(lambda leaf: leaf.chunk(sizes[0])[rank] if isinstance(leaf, Tensor) else leaf, inputs)


def _random_output_gradient(
    reference: nn.Module | None, model: nn.Module, inputs: Any, sizes: tuple[int, int]
) -> dict[str, float]:
    """Output, and gradients for a random gradient of it, which no symmetry of a loss can hide."""
    output = first_tensor(_call(model, _mine(inputs, sizes)))
    if isinstance(output, DeferredLogits):
        output = output.compute()
    shape = (output.shape[0] * sizes[0], *output.shape[1:])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)

    def mine(whole: Tensor) -> Tensor:
        whole = _mine(whole, sizes)
        if isinstance(output, DTensor):
            return whole.chunk(output.device_mesh.size(), -1)[output.device_mesh.get_local_rank()]
        return whole

    local = output.to_local(grad_placements=[Shard(output.dim() - 1)]) if isinstance(output, DTensor) else output
    (local * mine(grad) * sizes[0]).sum().backward()  # FSDP2 averages over the ranks
    differences: dict[str, float] = {}
    if reference is not None:
        expected = first_tensor(_call(reference, inputs))
        (expected * grad).sum().backward()
        differences["output"] = _off(local, mine(expected))
    gradients = _gradients(reference, model).items()
    return differences | {f"gradient of {name} for a random one": off for name, off in gradients}


def _train(
    reference: nn.Module | None, model: nn.Module, inputs: Any, loss_fn: LossFn, sizes: tuple[int, int], steps: int
) -> dict[str, float]:
    """Steps of two micro-batches each, of which only the second synchronises gradients; clipped to half the norm."""
    mine = _mine(inputs, sizes)
    differences: dict[str, float] = {}
    optimizers: list[torch.optim.Optimizer] = []
    for step in range(steps):
        for last in (False, True):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            loss = loss_fn(_call(model, mine), mine) / 2
            loss.backward()
            mean = loss.detach().clone() / sizes[0]
            dist.all_reduce(mean, group=mesh(*sizes).get_group("data_parallel"))
            if reference is not None:
                expected = loss_fn(_call(reference, inputs), inputs) / 2
                expected.backward()
                differences[f"loss of step {step}"] = _off(mean, expected)
        if step == 0:
            differences |= {f"gradient of {name}": off for name, off in _gradients(reference, model).items()}
            first_norm = _from_rank_0(_norm(reference) if reference is not None else 0.0)
            optimizers = [_optimizer(each, first_norm) for each in _both(reference, model)]
        norm = nn.utils.clip_grad_norm_(model.parameters(), first_norm / 2)
        whole_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if reference is not None:
            exact = _norm(reference, torch.float64)
            rounding = abs(_norm(reference) - exact) / exact  # torch's sum of millions of squares in fp32
            expected_norm = nn.utils.clip_grad_norm_(reference.parameters(), first_norm / 2)
            differences[f"norm of step {step}"] = max(0.0, _off(whole_norm, expected_norm) - rounding)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    whole = _whole(model, lambda parameter: parameter)
    named = reference.named_parameters() if reference is not None else ()
    weights = {name: weight for name, weight in named if weight.requires_grad or name in whole}  # others are quantized
    return differences | {f"{name} after {steps} steps": _off(whole[name], weight) for name, weight in weights.items()}


def _from_rank_0(number: float) -> float:
    value = torch.tensor(number, dtype=torch.float64)
    dist.broadcast(value, 0)
    return value.item()


def _norm(model: nn.Module, dtype: torch.dtype | None = None) -> float:
    return float(nn.utils.get_total_norm([p.grad.to(dtype) for p in model.parameters() if p.grad is not None]))


def _optimizer(model: nn.Module, norm: float) -> torch.optim.Optimizer:
    """AdamW that does not magnify rounding, as dividing a tiny gradient by its own size would."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    root_mean_square = norm / sum(parameter.numel() for parameter in parameters) ** 0.5
    return torch.optim.AdamW(parameters, lr=1e-3, eps=root_mean_square)


def _gradients(reference: nn.Module | None, model: nn.Module) -> dict[str, float]:
    """To be called on every rank; nothing where the reference is not."""
    gathered = _whole(model, lambda parameter: parameter.grad)
    if reference is None:
        return {}
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    if gathered.keys() != expected.keys():
        raise AssertionError(f"Only one of both has a gradient: {sorted(gathered.keys() ^ expected.keys())}")
    largest = max(float(grad.abs().max()) for grad in expected.values())
    return {name: _off(gathered[name], grad, largest) for name, grad in expected.items()}


def _whole(model: nn.Module, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """Gathered tensors by the names of the unparallelized model."""
    fused = fused_parameters(model)
    parts: dict[FusedPart, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if (tensor := of(parameter)) is not None:
            if isinstance(tensor, DTensor) and tensor.placements != parameter.placements:  # type: ignore[attr-defined]
                raise AssertionError(f"The gradient of {name} is left as {tensor.placements}.")
            parts.setdefault(fused.get(name, FusedPart(name, 0)), []).append(gather_shards(tensor))
    return {of.whole: torch.cat(tensors, of.dim) if len(tensors) > 1 else tensors[0] for of, tensors in parts.items()}


def _off(value: Tensor, expected: Tensor, largest: float = 0.0) -> float:
    """Relative to the largest expected value; or, where that is nothing but the rounding of others, to the largest.

    The gradient of a key's bias is zero without rotary positions, since softmax ignores what all keys have in common.
    """
    if value.shape != expected.shape:
        raise AssertionError(f"The shape is {tuple(value.shape)} and should be {tuple(expected.shape)}.")
    limits = torch.finfo(expected.dtype)
    scale = float(expected.abs().max())
    if scale < 8 * limits.eps * largest:
        scale = largest
    return float((value - expected).abs().max()) / max(scale, limits.tiny)
