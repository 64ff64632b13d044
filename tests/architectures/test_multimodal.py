"""Language models with a vision tower, which every rank computes whole."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fabric_tp
from fabric_tp.architectures import recognise
from fabric_tp.styles.random_module import RandomModule
from fabric_tp.testing import next_token_loss
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import LENGTH, VOCABULARY, small_causal
from tests.parity import assert_equal

BUILD = partial(small_causal, "gemma3")


def images(batch: int, tokens_of_each: int = 4) -> dict[str, Tensor]:
    """In each sample an image, then text."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY - 1, (batch, LENGTH), generator=generator)
    is_image = torch.zeros_like(tokens)
    is_image[:, 2 : 2 + tokens_of_each] = 1
    tokens = tokens.masked_fill(is_image.bool(), VOCABULARY - 1)
    pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    return {"input_ids": tokens, "token_type_ids": is_image, "pixel_values": pixels}


@pytest.mark.swept(lambda p: not p["sequence_parallel"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_equals_one_device(pool, sequence_parallel) -> None:
    assert recognise(BUILD()).name == "multimodal"
    assert_equal(pool, BUILD, fabric_tp.auto(sequence_parallel=sequence_parallel), (1, 2), inputs=images(2))


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", [(1, 4), (2, 2)], ids=str)
def test_other_meshes(pool, sizes) -> None:
    assert_equal(pool, BUILD, fabric_tp.auto(), sizes, inputs=images(2 * sizes[0]))


def test_a_tower_that_is_not_described_is_refused() -> None:
    model = BUILD()
    described = fabric_tp.Parallelize(architecture=replace(recognise(model), whole=()))
    with pytest.raises(ValueError, match=r"No style of the plan covers the parameters model\.multi_modal_projector\."):
        described.check(model, tensor_parallel_size=2)


def worst_difference_in_the_tower(by_rank: bool) -> float:
    """Of the ranks' gradients, with dropout in its attention, which has no module of its own."""
    model = fabric_tp.auto()(dropping(), mesh(1, 2)).train()
    tower = model.get_submodule("model.vision_tower")
    assert isinstance(tower, RandomModule)
    tower.by_rank = by_rank  # type: ignore[misc]
    torch.manual_seed(dist.get_rank())
    next_token_loss(model(**images(2)), images(2)).backward()
    mine = [parameter.grad.to_local() for parameter in tower.parameters() if parameter.grad is not None]  # type: ignore[attr-defined]
    assert mine
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, mine)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in zip(*ranks, strict=True))


def dropping() -> nn.Module:
    model = BUILD()
    for module in model.get_submodule("model.vision_tower").modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    return model


@pytest.mark.sweep
def test_all_ranks_drop_the_same_in_the_tower(pool) -> None:
    assert pool(2)(worst_difference_in_the_tower, by_rank=False) < 1e-3
    assert pool(2)(worst_difference_in_the_tower, by_rank=True) > 1e-1
