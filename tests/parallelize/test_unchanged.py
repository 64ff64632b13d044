"""What parallelizing a model leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT
from torch import Tensor, nn

import fabric_tp
from fabric_tp.shards import gather_shards
from fabric_tp.testing.parity import TOLERANCE, _gradients
from fabric_tp.testing.ranks import mesh
from tests.models import LENGTH, VOCABULARY, build, litgpt_config

Sizes = tuple[int, int]


def config_is_untouched(sizes: Sizes) -> None:
    config = litgpt_config("Llama-3-8B")
    before = copy.deepcopy(config)
    model: Any = fabric_tp.litgpt()(GPT(config), mesh(*sizes))
    assert model.config is config
    assert config == before
    attention = model.transformer.h[0].attn.config
    assert (attention.n_head, attention.n_query_groups) == (8 // sizes[1], 4 // sizes[1])
    assert (attention.head_size, attention.n_embd) == (8, 64)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_config_is_untouched(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(config_is_untouched, sizes)


def parameter_names(sizes: Sizes, options: dict[str, Any]) -> list[str]:
    model = fabric_tp.litgpt(**options)(build("Llama-3-8B"), mesh(*sizes))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    return sorted(name for name, _ in model.named_parameters())


@pytest.mark.swept(lambda p: p["compile"] != (p["activation_checkpointing"] == "full"))
@pytest.mark.parametrize("activation_checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("compile", [False, True])
def test_names_have_no_prefixes(pool, activation_checkpointing, compile) -> None:
    options = {"activation_checkpointing": activation_checkpointing, "compile": compile}
    expected = []
    for name, _ in build("Llama-3-8B").named_parameters():
        parts = [name.replace("qkv", f"qkv.{part}") for part in "qkv"] if "qkv" in name else [name]
        expected += parts
    assert pool(4)(parameter_names, (2, 2), options) == sorted(expected)


def batch(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(VOCABULARY, (rows, LENGTH), generator=generator) for _ in range(2))
    return x, y


def backward(reference: nn.Module, model: nn.Module, sizes: Sizes) -> None:
    """Of the same batch for both."""
    x, y = batch(2 * sizes[0])
    F.cross_entropy(reference(x).flatten(0, 1), y.flatten()).backward()
    rank = mesh(*sizes).get_local_rank("data_parallel")
    fabric_tp.cross_entropy(model(x.chunk(sizes[0])[rank]), y.chunk(sizes[0])[rank]).backward()


def tied(model: Any) -> Any:
    model.transformer.wte.weight = model.lm_head.weight
    return model


def tied_parameter_stays_one(sizes: Sizes, device: str) -> None:
    with torch.device("meta"):
        model: Any = tied(GPT(litgpt_config("Llama-3-8B")))
    if device == "cpu":
        model = tied(build("Llama-3-8B"))
    model = fabric_tp.litgpt()(model, mesh(*sizes))
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" in names
    assert "transformer.wte.weight" not in names
    assert model.transformer.wte.weight is model.lm_head.weight
    reference: Any = tied(build("Llama-3-8B"))
    copy_parameters(model, reference)
    backward(reference, model, sizes)
    errors = _gradients(reference, model)
    assert errors["lm_head.weight"] <= TOLERANCE, errors


def copy_parameters(model: nn.Module, reference: nn.Module) -> None:
    whole: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        for part in "qkv":
            name = name.replace(f"qkv.{part}.", "qkv.")
        whole.setdefault(name, []).append(gather_shards(parameter))
    reference.load_state_dict({name: torch.cat(parts) for name, parts in whole.items()}, strict=False)


@pytest.mark.swept(lambda p: p["sizes"] in ((1, 1), (2, 1)) or (p["sizes"], p["device"]) == ((1, 2), "cpu"))
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
def test_tied_embeddings(pool, sizes, device) -> None:
    pool(sizes[0] * sizes[1])(tied_parameter_stays_one, sizes, device)


def is_frozen(name: str) -> bool:
    return "wte" in name or "norm_1" in name or "attn" in name


def frozen_stays_frozen(sizes: Sizes) -> None:
    reference = build("Llama-3-8B")
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(not is_frozen(name))
    model = fabric_tp.litgpt()(copy.deepcopy(reference), mesh(*sizes))
    backward(reference, model, sizes)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not is_frozen(name), name
        if is_frozen(name):
            assert parameter.grad is None, name
        else:
            expected = reference.get_parameter(name).grad
            assert expected is not None
            error = (gather_shards(parameter.grad) - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE, (name, error.item())


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_frozen_parameters(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(frozen_stays_frozen, sizes)
