"""Hidden rows, a weight and a bias, split over ranks and whole; the loss and its gradients from either."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

import fabric_tp
from tests.loss.examples import assert_equal, reference, tensor_parallel

WIDTH, VOCABULARY, SHAPE, CHUNK = 6, 24, (3, 8), 5
LAYOUTS = ["replicate", "sequence"]

Inputs = tuple[Tensor, Tensor, Tensor | None]


def example(with_bias: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Inputs, Tensor]:
    """Hidden rows, weight and bias, and targets of which some are 3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*SHAPE, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64) if with_bias else None
    targets = torch.randint(VOCABULARY, SHAPE, generator=generator)
    targets.view(-1)[::4] = 3
    return (hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)), targets


def leaves(inputs: Inputs) -> Inputs:
    hidden, weight, bias = (None if x is None else x.detach().clone().requires_grad_() for x in inputs)
    assert hidden is not None
    assert weight is not None
    return hidden, weight, bias


def mine(inputs: Inputs, layout: str, size: int) -> Inputs:
    """This rank's part, leaves."""
    rank = tensor_parallel(size).get_local_rank()
    hidden, weight, bias = inputs
    hidden = hidden.chunk(size, 1)[rank] if layout == "sequence" else hidden
    return leaves((hidden, weight.chunk(size)[rank], None if bias is None else bias.chunk(size)[rank]))


def whole(inputs: Inputs, targets: Tensor, softcap: float | None = None, **options: Any) -> Tensor:
    logits = F.linear(*inputs)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    return reference(logits, targets, **options)


def fused(inputs: Inputs, targets: Tensor, layout: str, size: int, **options: Any) -> Tensor:
    hidden, weight, bias = inputs
    return fabric_tp.linear_cross_entropy(
        hidden,
        _distributed(weight, size),
        targets,
        bias=_distributed(bias, size),
        input_layout=layout,  # type: ignore[arg-type]
        **{"chunk_size": CHUNK, **options},
    )


def _distributed(x: Tensor | None, size: int) -> Any:
    return None if x is None else DTensor.from_local(x, tensor_parallel(size), [Shard(0)], run_check=False)


def gradients(loss: Tensor, inputs: Inputs, grad: Tensor | None = None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x for x in inputs if x is not None], grad))


def random_like(loss: Tensor) -> Tensor:
    """A gradient of the loss."""
    grad = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return grad.to(loss.dtype)


def expected_gradients(inputs: Inputs, targets: Tensor, layout: str, size: int, **options: Any) -> list[Tensor]:
    """This rank's part, for a random gradient of the loss."""
    every = leaves(inputs)
    loss = whole(every, targets, **options)
    of_hidden, *others = gradients(loss, every, random_like(loss))
    rank = tensor_parallel(size).get_local_rank()
    if layout == "sequence":
        of_hidden = of_hidden.chunk(size, 1)[rank]
    return [of_hidden, *(grad.chunk(size)[rank] for grad in others)]


def assert_like_whole_logits(
    targets: Tensor,
    layout: str,
    size: int,
    with_bias: bool = False,
    inputs: Inputs | None = None,
    **options: Any,
) -> None:
    """Loss, and every gradient for a random gradient of the loss."""
    inputs = inputs or example(with_bias)[0]
    parts = mine(inputs, layout, size)
    loss = fused(parts, targets, layout, size, **options)
    options.pop("chunk_size", None)
    assert type(loss) is Tensor
    assert_equal(loss, whole(inputs, targets, **options))
    expected = expected_gradients(inputs, targets, layout, size, **options)
    for grad, right in zip(gradients(loss, parts, random_like(loss)), expected, strict=True):
        assert_equal(grad, right)
