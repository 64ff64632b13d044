"""A vocabulary that the ranks do not divide: the last one has fewer rows of embedding and head."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fabric_tp
from fabric_tp.checkpoint import litgpt
from fabric_tp.loss.targets import Vocabulary
from fabric_tp.shards import gather_shards
from fabric_tp.testing.parity import TOLERANCE, compare
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import randomize, small_causal, small_config, small_gpt
from tests.models import LENGTH, VOCABULARY
from tests.parity import assert_equal, differences_of

ODD = VOCABULARY + 1


def gpt(name: str, **overrides: Any) -> partial[nn.Module]:
    return partial(small_gpt, small_config(name, padded_vocab_size=ODD, **overrides))


def smoothed(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return fabric_tp.cross_entropy(logits, tokens, label_smoothing=0.1, z_loss=1e-3)


CASES = {
    "defaults": (gpt("Llama-3-8B"), {}),
    "fused loss": (gpt("Llama-3-8B"), {"fused_loss": True}),
    "whole logits": (gpt("Llama-3-8B"), {"loss_parallel": False, "sequence_parallel": False}),
    "a head with a bias": (gpt("phi-2"), {}),
    "tied": (partial(small_causal, "llama", vocab_size=ODD, tie_word_embeddings=True), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_one_device(pool, case) -> None:
    build, options = CASES[case]
    assert_equal(pool, build, fabric_tp.auto(**options), (1, 2))


@pytest.mark.sweep
@pytest.mark.parametrize("fused_loss", [False, True])
@pytest.mark.parametrize("sizes", [(1, 4), (2, 2)], ids=str)
def test_other_meshes(pool, sizes, fused_loss) -> None:
    assert_equal(pool, gpt("Llama-3-8B"), fabric_tp.auto(fused_loss=fused_loss), sizes, steps=3)


def smoothed_differences(fused_loss: bool) -> float:
    tokens = torch.randint(ODD, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    parallelize_fn = fabric_tp.auto(fused_loss=fused_loss)
    return max(compare(gpt("Llama-3-8B"), parallelize_fn, tokens, smoothed, (1, 2), 1).values(), default=0.0)


@pytest.mark.parametrize("fused_loss", [False, True])
def test_label_smoothing_is_over_all_columns(pool, fused_loss) -> None:
    assert pool(2)(smoothed_differences, fused_loss) <= TOLERANCE


def as_if_even(_: nn.Module) -> None:
    Vocabulary.first = lambda self, rank: self.size // self.group.size * rank  # type: ignore[method-assign]


def even_again(first: Any) -> None:
    Vocabulary.first = first  # type: ignore[method-assign]


def test_a_wrong_offset_is_noticed(pool) -> None:
    try:
        assert max(differences_of(pool, gpt("Llama-3-8B"), fabric_tp.auto(), break_model=as_if_even).values()) > 0.01
    finally:
        pool(2)(even_again, Vocabulary.first)


def saved_and_loaded(folder: Any) -> float:
    """From one mesh to another, through litgpt's file."""
    build = gpt("Llama-3-8B")
    litgpt.save(fabric_tp.auto()(build(), mesh(1, 2)), folder / "lit_model.pth")
    model = fabric_tp.auto()(randomize(build(), seed=7), mesh(2, 1))
    litgpt.load(model, folder / "lit_model.pth")
    whole = dict(build().named_parameters())
    return max(
        float((gather_shards(p) - whole[name]).abs().max()) for name, p in model.named_parameters() if name in whole
    )


def test_checkpoint(pool, tmp_path) -> None:
    assert pool(2)(saved_and_loaded, tmp_path) == 0


def test_a_vocabulary_too_small_for_the_ranks() -> None:
    model = small_causal("llama", vocab_size=9)
    with pytest.raises(
        ValueError, match=r"=8 is too much for weight\.shape\[0\]=9 of .*: 2 on each rank leave nothing"
    ):
        fabric_tp.auto().check(model, tensor_parallel_size=8)
