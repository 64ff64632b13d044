"""Everything equals one device: output, every gradient, clipped norm, weights after clipped steps with accumulation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fabric_tp.styles import FusedColwise
from fabric_tp.styles.style import LocalModule
from fabric_tp.testing.parity import TOLERANCE
from tests.parity import PARTITIONED, assert_parity, compiled_by, differences

FACTORIES = {
    "Llama-3-8B": "litgpt",
    "Llama-2-7b-hf": "litgpt",
    "pythia-14m": "litgpt",
    "llama": "llama",
    "feed_forward": "feed_forward",
}
TRANSFORMERS = [name for name in FACTORIES if name != "feed_forward"]
MESHES = [(1, 2), (1, 4), (2, 2)]

OPTIONS = [
    *(((1, 2), True, True), ((1, 2), False, False)),
    *(((1, 4), True, False), ((1, 4), False, True)),
    *(((2, 2), True, True), ((2, 2), False, False)),
]
"""Meshes, sequence_parallel and loss_parallel: each two of them in all ways."""


def ids(value: object) -> str | None:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, dict):
        return ",".join(f"{name}={option}" for name, option in value.items()) or "defaults"
    return None


@pytest.mark.swept(
    lambda p: (
        (p["sizes"], p["sequence_parallel"], p["loss_parallel"]) != ((1, 2), True, True)
        and (p["name"], p["sizes"]) != ("Llama-3-8B", (2, 2))
    )
)
@pytest.mark.parametrize(
    ("name", "sizes", "sequence_parallel", "loss_parallel"),
    [
        *(("Llama-3-8B", *options) for options in OPTIONS),
        *((name, *options) for i, name in enumerate(TRANSFORMERS) if i for options in OPTIONS[i % 2 :: 2]),
    ],
    ids=ids,
)
def test_transformers(pool, name, sizes, sequence_parallel, loss_parallel) -> None:
    options = {"sequence_parallel": sequence_parallel, "loss_parallel": loss_parallel}
    pool(sizes[0] * sizes[1])(assert_parity, name, FACTORIES[name], options, sizes)


@pytest.mark.parametrize("sizes", MESHES, ids=ids)
def test_feed_forward(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(assert_parity, "feed_forward", "feed_forward", {}, sizes)


@pytest.mark.swept(lambda p: p["sizes"] == (4, 1) or p["name"] != "Llama-3-8B")
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (4, 1)], ids=ids)
@pytest.mark.parametrize("name", ["Llama-3-8B", "pythia-14m"])
def test_without_tensor_parallelism(pool, name, sizes) -> None:
    pool(sizes[0] * sizes[1])(assert_parity, name, "auto", {}, sizes)


@pytest.mark.swept(lambda p: (p["name"], p["sizes"]) != ("Llama-3-8B", (1, 2)))
@pytest.mark.parametrize(
    ("name", "activation_checkpointing", "sizes", "sequence_parallel"),
    [
        ("Llama-3-8B", "full", (1, 2), True),
        ("Llama-3-8B", "selective", (1, 2), True),
        ("Llama-3-8B", "full", (2, 2), True),
        ("Llama-3-8B", "selective", (1, 4), False),
        ("pythia-14m", "full", (1, 4), False),
        ("pythia-14m", "selective", (2, 2), True),
    ],
    ids=ids,
)
def test_activation_checkpointing(pool, name, activation_checkpointing, sizes, sequence_parallel) -> None:
    options = {"activation_checkpointing": activation_checkpointing, "sequence_parallel": sequence_parallel}
    pool(sizes[0] * sizes[1])(assert_parity, name, "litgpt", options, sizes)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("Llama-3-8B", {}, (2, 2)),
        ("Llama-3-8B", {"sequence_parallel": False, "loss_parallel": False}, (1, 2)),
        ("pythia-14m", {"activation_checkpointing": "selective"}, (1, 2)),
    ],
    ids=ids,
)
def test_compile(pool, name, options, sizes) -> None:
    backend = "inductor" if name == "pythia-14m" else PARTITIONED
    arguments = (name, FACTORIES[name], {"compile": True, **options}, sizes)
    pool(sizes[0] * sizes[1])(compiled_by, backend, assert_parity, *arguments)


@pytest.mark.swept(lambda p: p["reshard_after_forward"])
@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_reshard_after_forward(pool, reshard_after_forward) -> None:
    options = {"reshard_after_forward": reshard_after_forward}
    pool(4)(assert_parity, "Llama-3-8B", "litgpt", options, (2, 2))


# Each of these breaks one thing on purpose: the comparison must notice, by far.


def drop_norm_gradient_sum(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LocalModule) and module.parallelized.partial:
            module.parallelized.partial = frozenset()
            module.parallelized.grad_placements = {
                name: list(parameter.placements[-1:])  # type: ignore[attr-defined]
                for name, parameter in module.named_parameters(recurse=False)
            }
    model._forward_hooks.clear()


def add_bias_on_every_rank(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name.endswith("proj"):
            bias = module.get_parameter("bias")
            with torch.no_grad():
                bias._local_tensor.mul_(module.parallelized.group.size)  # type: ignore[attr-defined, union-attr]


def split_qkv_contiguously(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LocalModule) and isinstance(module.parallelized.style, FusedColwise):
            rank, size = module.parallelized.group.rank, module.parallelized.group.size
            whole = torch.cat([module.get_parameter(f"{part}.weight").full_tensor() for part in "qkv"])  # type: ignore[attr-defined]
            mine = whole.chunk(size)[rank]
            with torch.no_grad():
                for part in "qkv":
                    local = module.get_parameter(f"{part}.weight")._local_tensor  # type: ignore[attr-defined]
                    local.copy_(mine[: len(local)])
                    mine = mine[len(local) :]


def swap_heads(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LocalModule) and isinstance(module.parallelized.style, FusedColwise):
            with torch.no_grad():
                local = module.get_parameter("q.weight")._local_tensor  # type: ignore[attr-defined]
                local.copy_(torch.cat([local[8:16], local[:8], local[16:]]))


@pytest.mark.swept(lambda p: p["sizes"] == (2, 2))
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=ids)
@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        ("Llama-3-8B", drop_norm_gradient_sum),
        ("pythia-14m", drop_norm_gradient_sum),
        ("pythia-14m", add_bias_on_every_rank),
        ("Llama-3-8B", split_qkv_contiguously),
        ("Llama-2-7b-hf", swap_heads),
    ],
)
def test_notices_mutations(pool, name, mutation, sizes) -> None:
    worst = pool(sizes[0] * sizes[1])(unchecked_differences, name, mutation, sizes)
    assert max(worst.values()) > 10 * TOLERANCE


def unchecked_differences(name, mutation, sizes) -> dict[str, float]:
    return differences(name, "litgpt", {}, sizes, mutation)
