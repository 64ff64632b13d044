"""Bytes that a layer keeps for the backward: counted for Llama-3-8B on one of eight ranks, in fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from litgpt import GPT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import fabric_tp
from benchmarks.llama import Llama, Shape, torch_plan

RANKS, LENGTH, WIDTH = 8, 8192, 4096
LEAST = 23 + 1 / 32
"""Times s*b*h/t bytes: of 2 bytes the residual stream twice, queries, their part of keys and values, the output of
attention, gate and up (3.5 times as wide); and a number of 4 bytes for each head and position."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tensor_parallel",))
    dist.destroy_process_group()


def gpt(layers: int, **overrides: Any) -> nn.Module:
    return GPT.from_name("Llama-3-8B", n_layer=layers, **overrides)


def llama(layers: int) -> Llama:
    return Llama(Shape(layers, WIDTH, heads=32, kv_heads=8, hidden=14336, vocabulary=128256, batch=1, length=LENGTH))


def kept_per_layer(
    build: Callable[[int], nn.Module], parallelize: Callable[[Any, DeviceMesh], nn.Module], mesh: DeviceMesh
) -> float:
    """In multiples of s*b*h/t bytes."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        one, three = (kept(parallelize(_in_bf16(build, layers), mesh)) for layers in (1, 3))
    return (three - one) / 2 / (LENGTH * WIDTH / RANKS)


def _in_bf16(build: Callable[[int], nn.Module], layers: int) -> nn.Module:
    torch.set_default_dtype(torch.bfloat16)
    try:
        return build(layers)
    finally:
        torch.set_default_dtype(torch.float32)


def kept(model: nn.Module, length: int = LENGTH) -> int:
    """Bytes of the storages that are saved for the backward, without parameters and buffers."""
    owned = {_local(tensor).untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        if storage._cdata not in owned:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.zeros(1, length, dtype=torch.int64))
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(
    ("options", "multiple"),
    [
        ({}, LEAST),
        ({"overlap": True}, LEAST),
        ({"regather": False}, LEAST + 4 * RANKS),  # two gathered inputs of 2 bytes
        ({"activation_checkpointing": "full"}, 2),
        # The norms' outputs are whole on every rank, and so is what they are made from.
        ({"sequence_parallel": False}, LEAST - 4 + 4 * RANKS),
    ],
    ids=str,
)
def test_keeps_no_more_than_it_must(mesh, options, multiple) -> None:
    norms = 2 * 4 / WIDTH * (RANKS if "sequence_parallel" in options else 1)  # a number of 4 bytes for each row
    norms = 0 if "activation_checkpointing" in options else norms
    assert kept_per_layer(gpt, fabric_tp.litgpt(**options), mesh) == pytest.approx(multiple + norms)


def test_regathers_without_leanness(mesh) -> None:
    """Only shards are kept, of all that the model's own modules keep."""
    shards = kept_per_layer(gpt, fabric_tp.litgpt(lean=False), mesh)
    gathered = kept_per_layer(gpt, fabric_tp.litgpt(lean=False, regather=False), mesh)
    assert shards == pytest.approx(gathered - 4 * RANKS + 4)
    assert shards < 60


def test_needs_a_third_of_what_torch_keeps(mesh) -> None:
    torchs = kept_per_layer(llama, torch_plan, mesh)
    assert 4 * RANKS + 48 < torchs < 4 * RANKS + 52
    assert kept_per_layer(gpt, fabric_tp.litgpt(), mesh) < torchs / 3


def test_unknown_modules_keep_no_gathered_input(mesh) -> None:
    assert kept_per_layer(llama, fabric_tp.llama(verify=False), mesh) < 54


def test_windows_are_in_memory_once(mesh) -> None:
    """Of a Gemma 3 whose layers all have a sliding window."""

    def gemma(layers: int) -> nn.Module:
        return GPT.from_name("Gemma-3-1b-it", n_layer=layers, n_head=8, n_query_groups=8, block_size=LENGTH)

    per_layer = kept_per_layer(gemma, fabric_tp.litgpt(), mesh)
    mask = 2 * LENGTH**2 / (LENGTH * WIDTH / RANKS)
    assert per_layer < mask / 2
