"""Sequences that the ranks do not divide."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fabric_tp
from fabric_tp.autograd.padding import Padding, cut, fill
from fabric_tp.shards import gather_shards
from fabric_tp.styles.style import LocalModule
from fabric_tp.testing import next_token_loss
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import small_causal, small_config, small_gpt
from tests.models import VOCABULARY
from tests.parity import PARTITIONED, assert_equal, differences_of


def tokens(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))


def gpt(name: str, **overrides: Any) -> partial[nn.Module]:
    return partial(small_gpt, small_config(name, **overrides))


CASES = {
    "defaults": (gpt("Llama-3-8B"), {}),
    "fused loss": (gpt("Llama-3-8B"), {"fused_loss": True}),
    "full checkpointing": (gpt("Llama-3-8B"), {"activation_checkpointing": "full"}),
    "selective checkpointing": (gpt("Llama-3-8B"), {"activation_checkpointing": "selective"}),
    "kept gathers": (gpt("Llama-3-8B"), {"regather": False, "lean": False, "loss_parallel": False}),
    "parallel residual": (gpt("phi-2"), {}),
    "whole attention": (gpt("falcon-7b"), {"replicate_attention": True}),
    "experts": (gpt("Mixtral-8x7B-v0.1"), {}),
    "an embedding that is measured": (partial(small_causal, "llama"), {}),
    "experts of all tokens in a row": (partial(small_causal, "llama4_text"), {}),
}


@pytest.mark.swept(lambda p: p["case"] in list(CASES)[1::2])
@pytest.mark.parametrize("case", CASES)
def test_any_length(pool, case) -> None:
    build, options = CASES[case]
    assert_equal(pool, build, fabric_tp.auto(**options), (1, 2), inputs=tokens(15))


@pytest.mark.swept(lambda p: (p["sizes"], p["length"]) != ((1, 4), 3))
@pytest.mark.parametrize("length", [14, 3], ids=str)
@pytest.mark.parametrize("sizes", [(1, 4), (2, 2)], ids=str)
def test_other_meshes(pool, sizes, length) -> None:
    """Even one that leaves a rank nothing but padding."""
    inputs = tokens(length, rows=2 * sizes[0])
    assert_equal(pool, gpt("Llama-3-8B"), fabric_tp.auto(), sizes, inputs=inputs, steps=3)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["none", "full"])
def test_compiled(pool, kind) -> None:
    parallelize_fn = fabric_tp.auto(compile=True, activation_checkpointing=kind)
    assert_equal(pool, gpt("Llama-3-8B"), parallelize_fn, (1, 2), inputs=tokens(15), backend=PARTITIONED)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of two forwards of different lengths, both before their backward."""
    losses = [next_token_loss(model(batch), batch) for batch in (tokens(15), tokens(16))]
    sum(losses).backward()  # type: ignore[union-attr]
    return {name: gather_shards(parameter.grad) for name, parameter in model.named_parameters()}


def two_lengths_at_once(kind: str) -> float:
    reference = small_causal("llama")
    model: nn.Module = fabric_tp.auto(activation_checkpointing=kind)(copy.deepcopy(reference), mesh(1, 2))
    expected, found = gradients(reference), gradients(model)
    return max(float((found[name] - grad).abs().max() / grad.abs().max()) for name, grad in expected.items())


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_lengths_in_turn_before_their_backward(pool, kind) -> None:
    assert pool(2)(two_lengths_at_once, kind) <= TOLERANCE


def checkpointed_by_the_model() -> None:
    model = small_causal("llama")
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    model.train()
    fabric_tp.auto()(model, mesh(1, 2))
    with pytest.raises(ValueError, match=r"Let fabric_tp do it, with activation_checkpointing='full', or pad all"):
        gradients(model)


def test_what_somebody_else_computes_again_is_refused(pool) -> None:
    pool(2)(checkpointed_by_the_model)


def forget_padding(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LocalModule):
            module.parallelized.padding = Forgetful()


class Forgetful(Padding):
    def note(self, length: int, ranks: int) -> None:
        """Nothing."""


def test_forgotten_padding_is_noticed(pool) -> None:
    """Rows at the end do no harm to causal attention, but the logits then have more rows than there are tokens."""
    with pytest.raises(AssertionError):
        differences_of(pool, gpt("Llama-3-8B"), fabric_tp.auto(), inputs=tokens(15), break_model=forget_padding)


def test_fill_and_cut() -> None:
    x = torch.randn(2, 5, 3)
    filled = fill(x, 1, 4)
    assert filled.shape == (2, 8, 3)
    assert not filled[:, 5:].any()
    assert torch.equal(cut(filled, 1, 3), x)
    assert fill(x, 1, 5) is x
    assert cut(x, 1, 0) is x


def test_each_forward_has_its_own() -> None:
    padding = Padding()
    padding.note(15, 4)
    again = padding.recomputation()
    padding.note(17, 4)
    assert padding.rows == 3
    for _ in range(2):
        with again:
            assert padding.rows == 1
    assert padding.rows == 3
