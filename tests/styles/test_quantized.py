"""Frozen weights in four bits: the model is what one device has with weights that are rounded so."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from litgpt import GPT, Config, lora
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fabric_tp
from fabric_tp.checkpoint import parts
from fabric_tp.styles.quantized import quantizable, quantized_weights
from fabric_tp.testing import Report
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import small_causal, small_lora
from tests.models import VOCABULARY
from tests.parity import PARTITIONED, differences_of

WIDTHS = {"n_embd": 128, "head_size": 16, "n_head": 8, "intermediate_size": 256}  # so that 64 divides a rank's columns
MODELS = {
    "grouped": ("Llama-3-8B", {**WIDTHS, "n_query_groups": 4}),
    "shared keys": ("Llama-3-8B", {**WIDTHS, "n_query_groups": 1}),
    "biases": ("pythia-14m", {**WIDTHS, "n_query_groups": 8}),
    "experts": ("Mixtral-8x7B-v0.1", {**WIDTHS, "n_query_groups": 4, "moe_intermediate_size": 256}),
    "heads that ranks do not divide": ("Llama-3-8B", {**WIDTHS, "n_head": 3, "n_query_groups": 3, "head_size": 128}),
}


def rounded_weight(weight: Tensor, kind: str = "nf4") -> Tensor:
    return dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type=kind)).view(weight.shape)


def adapted(model: str, adapted: str = "every layer") -> nn.Module:
    name, sizes = MODELS[model]
    return small_lora(name, adapted, **sizes)


def rounded(model: str, *more: str) -> nn.Module:
    result = adapted(model, *more)
    with torch.no_grad():
        for weight in quantizable(result.transformer.h):
            weight.copy_(rounded_weight(weight))
    return result


QUANTIZED = fabric_tp.litgpt(quantize="bnb.nf4")


@pytest.mark.parametrize(
    ("model", "sizes", "options"),
    [
        ("grouped", (1, 2), {}),
        ("shared keys", (1, 2), {"activation_checkpointing": "full"}),
        pytest.param("biases", (2, 2), {"sequence_parallel": False}, marks=pytest.mark.sweep),
        pytest.param("experts", (2, 2), {"activation_checkpointing": "selective"}, marks=pytest.mark.sweep),
        pytest.param("heads that ranks do not divide", (1, 2), {}, marks=pytest.mark.sweep),
        pytest.param("grouped", (2, 1), {"lean": False}, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_equals_one_device(pool, model, sizes, options) -> None:
    parallelize = fabric_tp.litgpt(quantize="bnb.nf4", **options)
    report = Report(differences_of(pool, partial(rounded, model), parallelize, sizes, steps=3))
    assert report.equal, str(report)


@pytest.mark.sweep
def test_compiled(pool) -> None:
    parallelize = fabric_tp.litgpt(quantize="bnb.nf4", compile=True)
    report = Report(differences_of(pool, partial(rounded, "grouped"), parallelize, backend=PARTITIONED))
    assert report.equal, str(report)


def unround(model: nn.Module) -> None:
    """Other values in the first of the weights, on one of the ranks."""
    weight = next(iter(quantized_weights(model).values()))
    if mesh(1, 2).get_rank() == 1:
        weight.store(weight.local().flip(0))


def test_another_weight_would_be_noticed(pool) -> None:
    differences = differences_of(pool, partial(rounded, "grouped"), QUANTIZED, break_model=unround)
    assert not Report(differences).equal


def kept(model: str, kind: str) -> tuple[int, int, set[str]]:
    """Bytes of the frozen weights of the blocks, as they are and in the dtype of the model; names of all parameters."""
    parallelized = fabric_tp.litgpt(quantize=kind)(adapted(model), mesh(1, 2))
    weights = quantized_weights(parallelized).values()
    whole = sum(weight.local().nbytes for weight in weights)
    tensors = (each for weight in weights for each in weight.tensors())
    names = {name for name, parameter in parallelized.named_parameters() if not parameter.requires_grad}
    assert names.isdisjoint(quantized_weights(parallelized))
    return sum(each.nbytes for each in tensors), whole, names


@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.fp4"])
def test_bytes(pool, kind) -> None:
    stored, whole, names = pool(2)(kept, "grouped", kind)
    numbers, weights = whole / 4, 2 * 7
    assert stored == numbers / 2 + numbers / 64 * 4 + weights * 16 * 4
    assert not any(name.endswith(("fc_1.linear.weight", "qkv.linear.q.weight")) for name in names)


def test_no_weight_is_kept_for_the_backward(pool) -> None:
    """What the forward keeps of a layer whose input is kept, or not, anyway: nothing of its weight's shape."""
    assert pool(2)(saved_shapes) & pool(2)(local_shapes) == set()


def saved_shapes() -> set[tuple[int, ...]]:
    model = QUANTIZED(adapted("grouped"), mesh(1, 2))
    shapes: set[tuple[int, ...]] = set()

    def pack(tensor: Tensor) -> Tensor:
        shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros(3, 24, dtype=torch.int64))
    return shapes


def local_shapes() -> set[tuple[int, ...]]:
    model = QUANTIZED(adapted("grouped"), mesh(1, 2))
    shapes = {tuple(weight.local().shape) for weight in quantized_weights(model).values()}
    return shapes | {shape[::-1] for shape in shapes}


def whole_values(model: nn.Module) -> dict[str, Tensor]:
    wholes = parts.without_adapters(parts.whole_tensors(model))
    return {name: whole.gather() for name, whole in wholes.items()}


def read(directory: Path, sizes: tuple[int, int], on_meta: bool) -> dict[str, Tensor]:
    config = lora.Config.from_file(directory / "model_config.yaml", lora_r=2, lora_query=True, lora_mlp=True)
    with torch.device("meta" if on_meta else "cpu"):
        model = lora.GPT(config)
    lora.mark_only_lora_as_trainable(model)
    model = QUANTIZED(model, mesh(*sizes))
    fabric_tp.checkpoint.load(model, directory)
    return whole_values(model)


@pytest.fixture
def checkpoint(tmp_path) -> tuple[Path, dict[str, Tensor]]:
    from litgpt.utils import save_config

    name, sizes = MODELS["grouped"]
    config = Config.from_name(name, n_layer=2, block_size=64, padded_vocab_size=VOCABULARY, **sizes)
    model = GPT(config)
    torch.save(model.state_dict(), tmp_path / "lit_model.pth")
    save_config(config, tmp_path)
    return tmp_path, model.state_dict()


@pytest.mark.parametrize(("sizes", "on_meta"), [((1, 2), True), ((2, 2), False)], ids=str)
def test_a_checkpoint_is_rounded_as_it_is_read(pool, checkpoint, sizes, on_meta) -> None:
    directory, state = checkpoint
    found = pool(sizes[0] * sizes[1])(read, directory, sizes, on_meta)
    assert found.keys() == state.keys()
    for name, value in state.items():
        in_block = ".h." in name and value.dim() == 2
        assert torch.equal(found[name], rounded_weight(value) if in_block else value), name


def initial(quantize: bool) -> dict[str, Tensor]:
    name, sizes = MODELS["biases"]
    with torch.device("meta"):
        model = small_lora_on_meta(name, sizes)
    torch.manual_seed(1)
    options = {"quantize": "bnb.nf4"} if quantize else {}
    return whole_values(fabric_tp.litgpt(**options)(model, mesh(1, 2)))


def small_lora_on_meta(name: str, sizes: dict[str, int]) -> nn.Module:
    config = lora.Config.from_name(
        name, n_layer=1, block_size=64, padded_vocab_size=VOCABULARY, lora_r=2, lora_query=True, **sizes
    )
    model = lora.GPT(config)
    lora.mark_only_lora_as_trainable(model)
    return model


def test_initial_values_are_those_of_a_model_that_is_not_quantized(pool) -> None:
    found, expected = pool(2)(initial, True), pool(2)(initial, False)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        in_block = ".h." in name and value.dim() == 2
        assert torch.equal(found[name], rounded_weight(value) if in_block else value), name


def merged(directory: Path, quantize: bool) -> dict[str, Tensor]:
    config = lora.Config.from_file(directory / "model_config.yaml", lora_r=2, lora_query=True, lora_mlp=True)
    torch.manual_seed(0)
    model = lora.GPT(config)
    nn.init.normal_(model.transformer.h[0].mlp.fc_1.lora_B)
    lora.mark_only_lora_as_trainable(model)
    model = (QUANTIZED if quantize else fabric_tp.litgpt())(model, mesh(2, 2))
    fabric_tp.checkpoint.load(model, directory)
    with torch.device("meta"):
        unparallelized = lora.GPT(config)
    if quantize:
        with pytest.raises(ValueError, match=r"fabric_tp\.dequantize"):
            fabric_tp.checkpoint.litgpt.merge_adapters(model, unparallelized)
        fabric_tp.dequantize(model)
        fabric_tp.checkpoint.load(model, directory)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    fabric_tp.checkpoint.litgpt.merge_adapters(model, unparallelized)
    model(torch.zeros(2, 8, dtype=torch.int64))
    return whole_values(model)


def test_adapters_are_merged_with_the_weights_as_they_were(pool, checkpoint) -> None:
    directory, _ = checkpoint
    found, expected = pool(4)(merged, directory, True), pool(4)(merged, directory, False)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def adapted_gpt2() -> nn.Module:
    """Its layers store inputs first, q, k and v in one, and have biases."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(small_causal("gpt2", hidden_size=128), config)


def rounded_gpt2() -> nn.Module:
    model = adapted_gpt2()
    with torch.no_grad():
        for weight in quantizable(model.base_model.model.transformer.h):
            weight.copy_(rounded_weight(weight))
    return model


def test_transformers_with_peft(pool) -> None:
    parallelize = fabric_tp.auto(quantize="bnb.nf4", sequence_parallel=False)
    report = Report(differences_of(pool, rounded_gpt2, parallelize, (1, 2)))
    assert report.equal, str(report)


def test_refused() -> None:
    model = adapted("grouped")
    with (
        mock.patch("fabric_tp.styles.quantized.find_spec", return_value=None),
        pytest.raises(ValueError, match="pip install bitsandbytes"),
    ):
        QUANTIZED.check(model, tensor_parallel_size=2)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="mark_only_lora_as_trainable"):
        QUANTIZED.check(model, tensor_parallel_size=2)
    with pytest.raises(ValueError, match="quantize='nf4' is not known"):
        fabric_tp.litgpt(quantize="nf4")
