"""Decoders that may attend to the output of an encoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fabric_tp
from fabric_tp.architectures import recognise
from fabric_tp.architectures.huggingface import BART
from fabric_tp.parallelize.arguments import ENCODED
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import LENGTH, VOCABULARY, small_causal
from tests.parity import assert_equal

WIDTH = 64
TYPES = {"bart": "encoder_hidden_states", "whisper": "encoder_outputs"}


def inputs(argument: str, batch: int = 2) -> dict[str, Tensor]:
    """Tokens, and what an encoder made of other ones, of a length that no number of ranks divides."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (batch, LENGTH), generator=generator)
    return {"input_ids": tokens, argument: torch.randn(batch, LENGTH + 1, WIDTH, generator=generator)}


@pytest.mark.parametrize("options", [{}, {"replicate_attention": True}], ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_equals_one_device(pool, model_type, options) -> None:
    assert TYPES[model_type] in ENCODED
    given = inputs(TYPES[model_type])
    assert_equal(pool, partial(small_causal, model_type), fabric_tp.auto(**options), (1, 2), inputs=given)


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", [(1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_other_meshes(pool, model_type, sizes) -> None:
    given = inputs(TYPES[model_type], 2 * sizes[0])
    parallelize_fn = fabric_tp.auto(sequence_parallel=False)
    assert_equal(pool, partial(small_causal, model_type), parallelize_fn, sizes, inputs=given)


def gradient(given: dict[str, Any], encoded: Tensor, parallel: bool, **options: Any) -> Tensor:
    model = small_causal("bart")
    if parallel:
        model = fabric_tp.auto(loss_parallel=False, **options)(model, mesh(1, 2))
    encoded = encoded.clone().requires_grad_()
    model(**given, encoder_hidden_states=encoded).logits.square().sum().backward()
    assert encoded.grad is not None
    return encoded.grad


@pytest.mark.parametrize(
    "options", [{}, {"sequence_parallel": False}, {"replicate_attention": True}, {"activation_checkpointing": "full"}]
)
def test_the_encoder_gets_its_whole_gradient(pool, options) -> None:
    given = inputs("encoded")
    encoded = given.pop("encoded")
    expected = gradient(given, encoded, parallel=False)
    found = pool(2)(gradient, given, encoded, parallel=True, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_an_argument_that_the_forward_lacks_is_refused() -> None:
    model = small_causal("bart")
    assert recognise(model) is BART
    block = BART.block
    assert block is not None
    assert block.cross_attention is not None
    wrong = replace(BART, block=replace(block, cross_attention=replace(block.cross_attention, key_value_input="keys")))
    with pytest.raises(ValueError, match=r"model\.decoder\.layers\.0\.encoder_attn: The forward .* takes no 'keys'"):
        fabric_tp.Parallelize(architecture=wrong).plan(model, tensor_parallel_size=2)
