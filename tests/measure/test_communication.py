"""How often ranks talk: exactly as often as they must; and what runs is plain tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from litgpt import GPT
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fabric_tp
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import small_lora
from tests.models import LENGTH, VOCABULARY, litgpt_config

Counts = dict[str, int]


def count(options: dict[str, Any], layers: int, name: str, size: int) -> tuple[Counts, Counts, Counts]:
    """Collectives of forward, loss and backward."""
    model = fabric_tp.litgpt(**options)(GPT(litgpt_config(name, n_layer=layers)), mesh(1, size))
    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    with Collectives() as forward:
        logits = model(tokens)
    with Collectives() as loss_mode:
        loss = fabric_tp.cross_entropy(logits, tokens)
    with Collectives() as backward:
        loss.backward()
    return forward.counts, loss_mode.counts, backward.counts


class Collectives(TorchDispatchMode):
    """Counts them. Torch's CommDebugMode would put nodes of its own between those of modules in the graph."""

    NAMES = {  # noqa: RUF012
        "all_gather": "AG",
        "allgather": "AG",
        "reduce_scatter": "RS",
        "alltoall": "RS",  # on the CPU
        "all_reduce": "AR",
        "allreduce": "AR",
    }

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in operation.namespace and "wait" not in str(operation):
            kind = next(short for part, short in self.NAMES.items() if part in str(operation))
            self.counts[kind] = self.counts.get(kind, 0) + 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.swept(
    lambda p: p["layers"] == 1 or (p["size"] == 4 and p["name"] != "Llama-3-8B") or p["lean"] != p["regather"]
)
@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("regather", [True, False])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", ["Llama-3-8B", "pythia-14m"])
def test_sequence_parallel(pool, name, layers, size, regather, lean) -> None:
    """A gather per attention, MLP and head; a scatter per attention, MLP and embedding; one bucket for the norms.

    With ``regather``, each of what the forward gathered is gathered once more: two per layer and one for the head.
    """
    forward, loss, backward = pool(size)(count, {"regather": regather, "lean": lean}, layers, name, size)
    each = 2 * layers + 1
    gathered_again = each if regather else 0
    assert forward == {"AG": each, "RS": each}
    assert loss == {"AR": 2}
    assert backward == {"RS": each, "AG": each + gathered_again, "AR": 1}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layers", [1, 3])
def test_without_sequence_parallel(pool, layers, size) -> None:
    """An all-reduce per attention, MLP and embedding forward, and per attention, MLP and head backward."""
    forward, loss, backward = pool(size)(count, {"sequence_parallel": False}, layers, "Llama-3-8B", size)
    assert forward == {"AR": 2 * layers + 1}
    assert loss == {"AR": 2}
    assert backward == {"AR": 2 * layers + 1}


@pytest.mark.parametrize("regather", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", ["falcon-7b", "phi-2"])
def test_parallel_residual_with_shared_norm(pool, name, layers, regather) -> None:
    """Half: attention and MLP of a layer share a gather, a scatter and what is gathered again."""
    forward, _, backward = pool(2)(count, {"regather": regather}, layers, name, 2)
    each = layers + 1
    gathered_again = each if regather else 0
    assert forward == {"AG": each, "RS": each}
    assert backward == {"RS": each, "AG": each + gathered_again, "AR": 1}


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
    gathered_again = 7
    assert forward == {"AG": 7, "RS": 7}
    assert backward == {"RS": 7, "AG": 7 + gathered_again, "AR": 1}


@pytest.mark.parametrize("layers", [1, 3])
def test_experts(pool, layers) -> None:
    """One gather before router and experts, however many there are, and one scatter of what they add up.

    The experts keep the tokens they chose, so that only the inputs of attention and head are gathered again.
    """
    forward, _, backward = pool(2)(count, {}, layers, "Mixtral-8x7B-v0.1", 2)
    each, gathered_again = 2 * layers + 1, layers + 1
    assert forward == {"AG": each, "RS": each}
    assert backward == {"RS": each, "AG": each + gathered_again, "AR": 1}


@pytest.mark.parametrize("layers", [1, 3])
def test_experts_without_sequence_parallel(pool, layers) -> None:
    """The router's gradient is a partial sum, in a bucket."""
    forward, _, backward = pool(2)(count, {"sequence_parallel": False}, layers, "Mixtral-8x7B-v0.1", 2)
    assert forward == {"AR": 2 * layers + 1}
    assert backward == {"AR": 2 * layers + 2}


def test_without_loss_parallel(pool) -> None:
    """The logits are gathered; their gradient is the same everywhere, so each rank takes its part of it."""
    forward, loss, backward = pool(2)(count, {"loss_parallel": False}, 1, "Llama-3-8B", 2)
    gathered_again = 3
    assert forward == {"AG": 4, "RS": 3}
    assert loss == {}
    assert backward == {"RS": 3, "AG": 3 + gathered_again, "AR": 1}


@pytest.mark.parametrize(("kind", "reductions_again"), [("full", 1), ("selective", 0)])
@pytest.mark.parametrize("layers", [1, 3])
def test_activation_checkpointing(pool, layers, kind, reductions_again) -> None:
    """What is computed again is gathered again, once; the last reduction of a block never, and selectively none."""
    _, _, backward = pool(2)(count, {"activation_checkpointing": kind}, layers, "Llama-3-8B", 2)
    each, gathered_again = 2 * layers + 1, 2 * layers
    assert backward == {"RS": each + reductions_again * layers, "AG": each + gathered_again, "AR": 1}


@pytest.mark.parametrize(("kind", "reductions_again"), [("full", 1), ("selective", 0)])
def test_activation_checkpointing_without_sequence_parallel(pool, kind, reductions_again) -> None:
    options = {"activation_checkpointing": kind, "sequence_parallel": False}
    _, _, backward = pool(2)(count, options, 3, "Llama-3-8B", 2)
    assert backward == {"AR": 2 * 3 + 1 + reductions_again * 3}


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activation_checkpointing_of_a_parallel_residual(pool, kind) -> None:
    """The one reduction of a block comes last."""
    _, _, backward = pool(2)(count, {"activation_checkpointing": kind}, 3, "falcon-7b", 2)
    assert backward == {"RS": 4, "AG": 4 + 3, "AR": 1}


def count_with_adapters(layers: int, options: dict[str, Any]) -> Counts:
    model = fabric_tp.litgpt(**options)(small_lora("Llama-3-8B", "query and value", n_layer=layers), mesh(1, 2))
    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    loss = fabric_tp.cross_entropy(model(tokens), tokens)
    with Collectives() as backward:
        loss.backward()
    return backward.counts


@pytest.mark.parametrize("regather", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_adapters(pool, layers, regather) -> None:
    """What is frozen has no gradient: no sum of norms', no gather for linear layers', and nothing below the first
    adapter. An adapter and the layer in it sum the gradient of their input once, and gather it once more."""
    backward = pool(2)(count_with_adapters, layers, {"regather": regather})
    gathered_again = layers - 1 if regather else 0
    assert backward == {"RS": 2 * layers, "AG": 2 * layers + gathered_again, "AR": 1}


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
