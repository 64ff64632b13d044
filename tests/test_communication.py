"""How often ranks talk: exactly as often as they must; and what runs is plain tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from litgpt import GPT
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fabric_tp
from fabric_tp.testing.ranks import mesh
from tests.models import LENGTH, VOCABULARY, litgpt_config

Counts = dict[str, int]


def count(options: dict[str, Any], layers: int, name: str, size: int) -> tuple[Counts, Counts, Counts]:
    """Collectives of forward, loss and backward."""
    model = fabric_tp.litgpt(**options)(GPT(litgpt_config(name, n_layer=layers)), mesh(1, size))
    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    with CommDebugMode() as forward:
        logits = model(tokens)
    with CommDebugMode() as loss_mode:
        loss = fabric_tp.cross_entropy(logits, tokens)
    with CommDebugMode() as backward:
        loss.backward()
    return _named(forward), _named(loss_mode), _named(backward)


def _named(mode: CommDebugMode) -> Counts:
    counts: Counts = {}
    for operation, number in mode.get_comm_counts().items():
        short = {"all_gather": "AG", "reduce_scatter": "RS", "all_reduce": "AR", "allreduce": "AR"}
        kind = next(abbreviation for part, abbreviation in short.items() if part in str(operation))
        counts[kind] = counts.get(kind, 0) + number
    return counts


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", ["Llama-3-8B", "pythia-14m"])
def test_sequence_parallel(pool, name, layers, size) -> None:
    """A gather per attention, MLP and head; a scatter per attention, MLP and embedding; one bucket for the norms."""
    forward, loss, backward = pool(size)(count, {}, layers, name, size)
    each = 2 * layers + 1
    assert forward == {"AG": each, "RS": each}
    assert loss == {"AR": 2}
    assert backward == {"RS": each, "AG": each, "AR": 1}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layers", [1, 3])
def test_without_sequence_parallel(pool, layers, size) -> None:
    """An all-reduce per attention, MLP and embedding forward, and per attention, MLP and head backward."""
    forward, loss, backward = pool(size)(count, {"sequence_parallel": False}, layers, "Llama-3-8B", size)
    assert forward == {"AR": 2 * layers + 1}
    assert loss == {"AR": 2}
    assert backward == {"AR": 2 * layers + 1}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", ["falcon-7b", "phi-2"])
def test_parallel_residual_with_shared_norm(pool, name, layers) -> None:
    """Half: attention and MLP of a layer share a gather and a scatter."""
    forward, _, backward = pool(2)(count, {}, layers, name, 2)
    each = layers + 1
    assert forward == {"AG": each, "RS": each}
    assert backward == {"RS": each, "AG": each, "AR": 1}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("name", "buckets"), [("falcon-7b", 0), ("phi-2", 1)])
def test_parallel_residual_with_shared_norm_without_sequence_parallel(pool, name, buckets, layers) -> None:
    """Half as well; a bias within the shared sum is one rank's to add, and its gradient in a bucket."""
    forward, _, backward = pool(2)(count, {"sequence_parallel": False}, layers, name, 2)
    assert forward == {"AR": layers + 1}
    assert backward == {"AR": layers + 1 + buckets}


def test_parallel_residual_with_two_norms(pool) -> None:
    """Attention and MLP take different inputs, so each has its own gather."""
    forward, _, backward = pool(2)(count, {}, 3, "falcon-40b", 2)
    assert forward == {"AG": 7, "RS": 7}
    assert backward == {"RS": 7, "AG": 7, "AR": 1}


@pytest.mark.parametrize("layers", [1, 3])
def test_experts(pool, layers) -> None:
    """One gather before router and experts, however many there are, and one scatter of what they add up."""
    forward, _, backward = pool(2)(count, {}, layers, "Mixtral-8x7B-v0.1", 2)
    each = 2 * layers + 1
    assert forward == {"AG": each, "RS": each}
    assert backward == {"RS": each, "AG": each, "AR": 1}


@pytest.mark.parametrize("layers", [1, 3])
def test_experts_without_sequence_parallel(pool, layers) -> None:
    """The router's gradient is a partial sum, in a bucket."""
    forward, _, backward = pool(2)(count, {"sequence_parallel": False}, layers, "Mixtral-8x7B-v0.1", 2)
    assert forward == {"AR": 2 * layers + 1}
    assert backward == {"AR": 2 * layers + 2}


def test_without_loss_parallel(pool) -> None:
    """The logits are gathered; their gradient is the same everywhere, so each rank takes its part of it."""
    forward, loss, backward = pool(2)(count, {"loss_parallel": False}, 1, "Llama-3-8B", 2)
    assert forward == {"AG": 4, "RS": 3}
    assert loss == {}
    assert backward == {"RS": 3, "AG": 3, "AR": 1}


def test_one_rank_is_silent(pool) -> None:
    assert pool(1)(count, {}, 1, "Llama-3-8B", 1) == ({}, {}, {})


class NoDTensorOperations(TorchDispatchMode):
    """Fails on any operation on a DTensor."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(leaf, DTensor) for leaf in tree_leaves((args, kwargs))):
            raise AssertionError(f"{operation} ran on a DTensor")
        return operation(*args, **(kwargs or {}))


def step_without_dtensor_operations(options: dict[str, Any], spoil: bool = False) -> None:
    model: nn.Module = fabric_tp.litgpt(**options)(GPT(litgpt_config("Llama-3-8B")), mesh(1, 2))
    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    parameters = list(model.parameters())
    with NoDTensorOperations():
        logits = model(tokens)
        if spoil:
            logits = logits + 1
        # Gradients are taken and not accumulated: keeping one in .grad is an operation of autograd, not of the model.
        torch.autograd.grad(fabric_tp.cross_entropy(logits, tokens), parameters)


@pytest.mark.parametrize(
    "options", [{}, {"sequence_parallel": False}, {"activation_checkpointing": "full"}], ids=["defaults", "no sp", "ac"]
)
def test_no_dtensor_operation_from_tokens_to_gradients(pool, options) -> None:
    pool(2)(step_without_dtensor_operations, options)


def test_a_dtensor_operation_would_be_noticed(pool) -> None:
    with pytest.raises(AssertionError, match="ran on a DTensor"):
        pool(2)(step_without_dtensor_operations, {}, spoil=True)
