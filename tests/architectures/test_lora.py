"""litgpt.lora.GPT: adapters follow their base layer, and nothing else is trained or kept for it."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from litgpt import lora
from torch import Tensor, nn

import fabric_tp
from fabric_tp.architectures import recognise
from fabric_tp.loss.deferred import DeferredLogits
from fabric_tp.testing import next_token_loss
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import LORA, one_of_each_structure, small_lora
from tests.models import LENGTH, VOCABULARY
from tests.parity import assert_equal

WIDE = ["falcon-40b"]  # 128 heads, in the table of ``python -m fabric_tp.testing lora`` only
NAMES = [name for name in one_of_each_structure() if name not in WIDE]


@pytest.mark.swept(lambda p: p["name"] not in NAMES[:6])
@pytest.mark.parametrize(("name", "adapted"), [(name, list(LORA)[i % 2]) for i, name in enumerate(NAMES)])
def test_structure(pool, name, adapted) -> None:
    """Each with one of both kinds; ``python -m fabric_tp.testing lora`` has all."""
    assert_equal(pool, partial(small_lora, name, adapted), fabric_tp.litgpt(), (1, 2))


@pytest.mark.swept(lambda p: p["name"] != "Gemma-3-1b-it")
@pytest.mark.parametrize(
    ("name", "adapted", "sizes"),
    [
        ("Gemma-3-1b-it", "every layer", (2, 2)),
        ("Qwen2.5-1.5B", "query and value", (1, 4)),
        ("phi-1_5", "every layer", (1, 4)),
        ("Mixtral-8x7B-v0.1", "query and value", (2, 2)),
    ],
)
def test_more_ranks(pool, name, adapted, sizes) -> None:
    assert_equal(pool, partial(small_lora, name, adapted), fabric_tp.litgpt(), sizes)


@pytest.mark.parametrize("options", [{"sequence_parallel": False}, {"loss_parallel": False}], ids=str)
@pytest.mark.parametrize("name", ["Gemma-2b", "pythia-14m"])
def test_options(pool, name, options) -> None:
    assert_equal(pool, partial(small_lora, name, "every layer"), fabric_tp.litgpt(**options), (1, 2))


@pytest.mark.parametrize("adapted", LORA)
@pytest.mark.parametrize("name", NAMES)
def test_is_recognised(name, adapted) -> None:
    assert recognise(small_lora(name, adapted)).name == "litgpt"


def trained(name: str, adapted: str, sizes: tuple[int, int]) -> tuple[set[str], set[str]]:
    """Names of the parameters that require gradients, and of those that get some."""
    model = fabric_tp.litgpt()(small_lora(name, adapted), mesh(*sizes))
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    next_token_loss(model(tokens), tokens).backward()
    parameters = dict(model.named_parameters())
    wanted = {name for name, parameter in parameters.items() if parameter.requires_grad}
    return wanted, {name for name, parameter in parameters.items() if parameter.grad is not None}


@pytest.mark.swept(lambda p: p["sizes"] == (2, 2))
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("adapted", LORA)
@pytest.mark.parametrize("name", ["Llama-3-8B", "pythia-14m"])
def test_only_adapters_are_trained(pool, name, adapted, sizes) -> None:
    wanted, got = pool(sizes[0] * sizes[1])(trained, name, adapted, sizes)
    assert wanted == got
    whole = {name.removesuffix(f".{part}") for name in wanted for part in ("lora_A", "lora_B")}
    assert all("lora_A" in name or "lora_B" in name for name in wanted)
    assert all(any(name.startswith(layer) for layer in whole) for name in wanted)
    layers = {name.split(".lora_")[0].removesuffix(".q").removesuffix(".k").removesuffix(".v") for name in wanted}
    before = small_lora(name, adapted).named_parameters()
    assert layers == {name.split(".lora_")[0] for name, parameter in before if parameter.requires_grad}


def kept_inputs(frozen: bool, options: dict[str, Any]) -> dict[str, bool]:
    """For each linear layer without an adapter, whether its input is kept for the backward."""
    model = small_lora("Llama-3-8B", "query and value")
    if not frozen:
        model.requires_grad_(True)
    model = fabric_tp.litgpt(regather=False, lean=False, **options)(model, mesh(1, 2))
    kept: set[int] = set()
    inputs: dict[str, Tensor] = {}  # alive until the end, so that no address is used twice

    def remember(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0]

    for name, module in model.named_modules():
        if name.endswith(("mlp.fc_1.linear", "mlp.fc_2.linear", "mlp.proj.linear")):
            module.register_forward_pre_hook(partial(remember, name))

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.zeros(2, LENGTH, dtype=torch.int64))
    assert output.requires_grad
    return {name: x.untyped_storage().data_ptr() in kept for name, x in inputs.items()}


@pytest.mark.parametrize("options", [{}, {"sequence_parallel": False}], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_layers_keep_no_input(pool, frozen, options) -> None:
    kept = pool(2)(kept_inputs, frozen, options)
    assert len(kept) == 2 * 3
    assert set(kept.values()) == {not frozen}, kept


def kept_whole(options: dict[str, Any], dropout: float) -> set[str]:
    """Adapters whose gathered input, or what their dropout made of it, is kept for the backward."""
    model = small_lora("Llama-3-8B", "query and value", lora_dropout=dropout, n_layer=3)
    model = fabric_tp.litgpt(**options)(model, mesh(1, 2))
    kept: set[int] = set()
    inputs: dict[str, Tensor] = {}  # alive until the end, so that no address is used twice
    for name, module in model.named_modules():
        if name.endswith("attn.qkv"):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        if name.endswith("attn.qkv.lora_dropout"):
            module.register_forward_hook(lambda _, args, y, name=name: inputs.update({name: y}))

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros(2, LENGTH, dtype=torch.int64))
    assert len(inputs) == (6 if dropout else 3)
    return {name for name, x in inputs.items() if x.untyped_storage().data_ptr() in kept}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_keep_no_gathered_input(pool, dropout) -> None:
    """Other than in the first block, whose input has no gradient: nothing in the backward asks for it again."""
    first = "transformer.h.0.attn.qkv"
    kept = pool(2)(kept_whole, {}, dropout)
    assert kept == {f"{first}.lora_dropout" if dropout else first}
    assert len(pool(2)(kept_whole, {"regather": False}, dropout)) == 3


def kinds_of_parameters(sizes: tuple[int, int]) -> dict[str, bool]:
    """For each parameter, whether it has a gradient after a backward and, which is the same, a state of AdamW."""
    model = fabric_tp.litgpt()(small_lora("Llama-3-8B", "query and value"), mesh(*sizes))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    next_token_loss(model(tokens), tokens).backward()
    optimizer.step()
    states = {id(parameter) for parameter in optimizer.state}
    parameters = dict(model.named_parameters())
    assert all((id(parameter) in states) == (parameter.grad is not None) for parameter in parameters.values())
    return {name: parameter.grad is not None for name, parameter in parameters.items()}


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=str)
def test_frozen_weights_have_no_gradient_and_no_state(pool, sizes) -> None:
    found = pool(2)(kinds_of_parameters, sizes)
    assert {name for name, has_both in found.items() if has_both} == {name for name in found if "lora_" in name}


@pytest.mark.parametrize("adapted", LORA)
def test_fused_loss(pool, adapted) -> None:
    """A head without an adapter of its own is fused with the loss; one with an adapter is not, and equal too."""
    assert_equal(pool, partial(small_lora, "Llama-3-8B", adapted), fabric_tp.litgpt(fused_loss=True), (1, 2))
    assert pool(2)(fuses_loss, adapted) == (adapted != "every layer")


def fuses_loss(adapted: str) -> bool:
    model = fabric_tp.litgpt(fused_loss=True)(small_lora("Llama-3-8B", adapted), mesh(1, 2))
    return isinstance(model(torch.zeros(2, LENGTH, dtype=torch.int64)), DeferredLogits)


def train_and_merge(name: str, adapted: str, directory: Path) -> None:
    """Three steps in parallel, saved, loaded on one device and merged; the same on one device from the start."""
    reference = small_lora(name, adapted)
    before = {name: weight.clone() for name, weight in reference.state_dict().items()}
    model = fabric_tp.litgpt()(copy.deepcopy(reference), mesh(1, 2))
    for each in (reference, model):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.01)
        for seed in range(3):
            tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
            next_token_loss(each(tokens), tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    fabric_tp.checkpoint.litgpt.save(model, directory / "lit_model.pth")
    merged: Any = small_lora(name, adapted)
    merged.load_state_dict(torch.load(directory / "lit_model.pth"))
    for each in (merged, reference):
        lora.merge_lora_weights(each)
    expected = reference.state_dict()
    for key, weight in merged.state_dict().items():
        assert (weight - expected[key]).abs().max() <= TOLERANCE * expected[key].abs().max(), key
    changed = [key for key in before if key.endswith("qkv.linear.weight")]
    assert changed
    assert all(not torch.equal(before[key], expected[key]) for key in changed)


@pytest.mark.swept(lambda p: p["name"] == "Gemma-2b" or p["adapted"] == "query and value")
@pytest.mark.parametrize("adapted", ["every layer", "query and value"])
@pytest.mark.parametrize("name", ["Llama-3-8B", "Gemma-2b", "Mixtral-8x7B-v0.1"])
def test_merging_gives_the_weights_of_one_device(pool, tmp_path, name, adapted) -> None:
    pool(2)(train_and_merge, name, adapted, tmp_path)
