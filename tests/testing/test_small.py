"""Small configs keep what makes the structure of the large ones."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from litgpt import Config, lora

from fabric_tp.architectures.litgpt.small import STRUCTURE
from fabric_tp.testing.small import names, one_of_each_structure, small_config, small_gpt

SIZES = {
    "n_layer",
    "n_embd",
    "head_size",
    "intermediate_size",
    "moe_intermediate_size",
    "block_size",
    "vocab_size",
    "padded_vocab_size",
    "n_expert",
    "n_expert_per_token",
    "sliding_window_size",
    "sliding_window_indices",
    "rope_indices",
    "rope_n_elem",
}
"""What may differ."""


def full_config(name: str) -> Any:
    return Config.from_name(name)


def test_all_configs() -> None:
    assert len(names()) == len(set(names())) == 210


@pytest.mark.parametrize("name", names())
def test_keeps_structure(name) -> None:
    small, full = small_config(name), full_config(name)
    for field in fields(Config):
        if field.name not in SIZES:
            assert getattr(small, field.name) == getattr(full, field.name), field.name
    for option in STRUCTURE:
        assert bool(getattr(small, option)) == bool(getattr(full, option)), option
    assert (small.n_embd == small.head_size * small.n_head) == (full.n_embd == full.head_size * full.n_head)
    assert bool(small.rope_n_elem) == bool(full.rope_n_elem)
    assert (small.rope_n_elem == small.head_size) == (full.rope_n_elem == full.head_size)
    assert bool(small.n_expert) == bool(full.n_expert)
    assert (small.padded_vocab_size, small.n_layer) == (96, 2)


@pytest.mark.parametrize("name", [name for name in names() if full_config(name).sliding_window_size])
def test_keeps_the_kinds_of_window(name) -> None:
    small, full = small_config(name), full_config(name)
    assert set(small.sliding_window_indices) == set(full.sliding_window_indices)


@pytest.mark.parametrize("name", [name for name in names() if full_config(name).rope_indices])
def test_keeps_the_kinds_of_positions(name) -> None:
    assert set(small_config(name).rope_indices) == set(full_config(name).rope_indices)


@pytest.mark.parametrize("name", one_of_each_structure())
def test_lora_configs_are_the_same(name) -> None:
    small, with_lora = small_config(name), small_config(name, lora.Config, lora_r=4)
    assert all(getattr(small, field.name) == getattr(with_lora, field.name) for field in fields(Config))


@pytest.mark.parametrize("name", ["pythia-14m", "Gemma-2b"])
def test_random_parameters_hide_nothing(name) -> None:
    """The same each time; no bias is zero, and no norm weight one."""
    models = [dict(small_gpt(small_config(name)).named_parameters()) for _ in range(2)]
    for key, parameter in models[0].items():
        assert parameter.equal(models[1][key])
        assert parameter.ne(0).all()
        assert parameter.ne(1).all()
