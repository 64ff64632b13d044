"""Plans of one's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import fabric_tp
from fabric_tp.shards import gather_shards
from fabric_tp.styles import Colwise, LMHead, PrepareInput, Replicated, Rowwise, VocabParallelEmbedding
from fabric_tp.testing.parity import TOLERANCE, _gradients
from fabric_tp.testing.ranks import mesh
from tests.models import LENGTH, VOCABULARY, build
from tests.parallelize.test_unchanged import backward, copy_parameters
from tests.parity import PARTITIONED, compiled_by
from tests.plan.test_derive import LLAMA_KEYS

Sizes = tuple[int, int]


MIXED: dict[str, Mapping[str, ParallelStyle]] = {
    "torch's": {"w1": ColwiseParallel(), "w3": ColwiseParallel(), "w2": RowwiseParallel()},
    "torch's w1": {"w1": ColwiseParallel(), "w3": Colwise(), "w2": Rowwise()},
    "torch's w2": {"w1": Colwise(), "w3": Colwise(), "w2": RowwiseParallel()},
    "ours": {"": PrepareInput(), "w1": Colwise(None), "w3": Colwise(None), "w2": Rowwise()},
    "replicated": {"*": Replicated()},
}


def trains_like_one_device(plan: Mapping[str, ParallelStyle], sizes: Sizes, by_torch: bool) -> None:
    reference = build("feed_forward")
    model: nn.Module = copy.deepcopy(reference)
    if by_torch:
        model = parallelize_module(model, mesh(*sizes)["tensor_parallel"], dict(plan))
    else:
        model = fabric_tp.from_plan(plan)(model, mesh(*sizes))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-5) for m in (reference, model)]
    rank = mesh(*sizes).get_local_rank("data_parallel")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(2 * sizes[0], LENGTH, 64, generator=generator) for _ in range(2))
        F.mse_loss(reference(x), y).backward()
        F.mse_loss(model(x.chunk(sizes[0])[rank]), y.chunk(sizes[0])[rank]).backward()
        norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.05) for m in (reference, model)]
        assert isinstance(norms[1], DTensor)
        torch.testing.assert_close(norms[1].full_tensor(), norms[0], rtol=TOLERANCE, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        expected = reference.get_parameter(name)
        error = (gather_shards(parameter) - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE, (name, error.item())


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("plan", MIXED.values(), ids=MIXED)
def test_from_plan_trains_like_one_device(pool, plan, sizes) -> None:
    pool(sizes[0] * sizes[1])(trains_like_one_device, plan, sizes, False)


@pytest.mark.parametrize("plan", MIXED.values(), ids=MIXED)
def test_styles_in_torchs_parallelize_module(pool, plan) -> None:
    pool(2)(trains_like_one_device, plan, (1, 2), True)


def head_and_embedding() -> None:
    """A small plan written by hand, of the ends of a model."""
    model: Any = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.LayerNorm(8), nn.Linear(8, VOCABULARY))
    reference = copy.deepcopy(model)
    plan = {
        "0": VocabParallelEmbedding(output_layout="sequence"),
        "1": Replicated("sequence"),
        "2": LMHead(input_layout="sequence"),
    }
    model = fabric_tp.from_plan(plan)(model, mesh(1, 2))
    copy_parameters(model, reference)
    backward(reference, model, (1, 2))
    errors = _gradients(reference, model)
    assert max(errors.values()) <= TOLERANCE, errors


def test_plan_by_hand_with_sequence_parallel(pool) -> None:
    pool(2)(head_and_embedding)


def test_blocks_of_torchs_styles_are_not_compiled_one_by_one() -> None:
    """torch 2.13 then has gradients of zero, on some meshes without a word."""
    model = nn.Sequential(build("feed_forward"))
    plan = {f"0.{name}": style for name, style in MIXED["torch's"].items()}
    fabric_tp.from_plan(plan, compile=True).check(model, tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"not right with torch's own ColwiseParallel, RowwiseParallel: gradients"):
        fabric_tp.from_plan(plan, compile=True, blocks="0").check(model, tensor_parallel_size=2)
    ours = {f"0.{name}" if name else "0": style for name, style in MIXED["ours"].items()}
    fabric_tp.from_plan(ours, compile=True, blocks="0").check(model, tensor_parallel_size=2)


def compiled_as_a_whole() -> float:
    reference = build("feed_forward")
    model = fabric_tp.from_plan(MIXED["torch's"], compile=True)(copy.deepcopy(reference), mesh(1, 2))
    x = torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(0))
    for each in (reference, model):
        each(x).square().sum().backward()
    return max(_gradients(reference, model).values())


@pytest.mark.sweep
def test_torchs_styles_compiled_as_a_whole(pool) -> None:
    assert pool(2)(compiled_by, PARTITIONED, compiled_as_a_whole) <= TOLERANCE


def patterns(plan: Mapping[str, ParallelStyle]) -> set[str]:
    return set(fabric_tp.from_plan(plan).plan(build("llama"), tensor_parallel_size=2))


def test_derived_plan_can_be_edited_and_used() -> None:
    plan = fabric_tp.llama().plan(build("llama"), tensor_parallel_size=2)
    plan["norm"] = Replicated("replicate")
    assert patterns(plan) == LLAMA_KEYS
