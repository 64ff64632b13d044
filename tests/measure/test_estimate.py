"""What is predicted on fake tensors is what real steps of real ranks need."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from litgpt import GPT, Config, lora
from litgpt.utils import save_config
from torch import nn

import fabric_tp
from fabric_tp.architectures.litgpt.config import load_config, make_model, meta_model
from fabric_tp.measure.estimation import Precision, estimate
from fabric_tp.measure.fit import cheapest, fit
from fabric_tp.measure.step import count_step, default_dtype
from fabric_tp.mesh import fake_mesh
from fabric_tp.parallelize import ActivationCheckpointing
from fabric_tp.testing.ranks import mesh
from tests.models import VOCABULARY, litgpt_config

LENGTH, BATCH = 64, 2
# Wide enough that tensors and not single numbers decide.
WIDE = {"n_layer": 3, "n_embd": 128, "head_size": 16, "intermediate_size": 192}


ADAPTERS = {"lora_r": 8, "lora_dropout": 0.1, "lora_query": True, "lora_value": True, "lora_mlp": True}


def config_of(name: str, adapted: bool = False) -> Config:
    config = litgpt_config(name, **WIDE)
    given = {each.name: getattr(config, each.name) for each in fields(config) if each.init}
    return lora.Config(**given, **ADAPTERS) if adapted else config


def real_step(
    name: str, sizes: tuple[int, int], options: dict[str, Any], precision: Precision, adapted: bool = False
) -> tuple[int, dict, dict]:
    """Peak and kinds of memory of a rank, and bytes that it sends by dimension of the mesh."""
    options = {**options, **({"mixed_precision": "bf16-mixed"} if precision == "bf16-mixed" else {})}
    model: nn.Module = make_model(config_of(name, adapted))
    if precision == "bf16-true":
        model.to(torch.bfloat16)
    model.reset_parameters()  # type: ignore[operator]
    fabric_tp.litgpt(**options)(model, mesh(*sizes))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    targets = tokens.clone()
    # gloo's threads free what an asynchronous collective took when they get to it: a step may count that as well.
    step, *others = (
        count_step(
            model,
            optimizer,
            lambda: model(tokens),
            lambda logits: fabric_tp.cross_entropy(logits, targets),
            mesh=mesh(*sizes),
            batch=(tokens, targets),
            lm_head=model.get_submodule("lm_head"),
        )
        for _ in range(3)
    )
    most = {kind: min(most, *(other.memory.most[kind] for other in others)) for kind, most in step.memory.most.items()}
    axes = {each.axis for each in step.collectives}
    return (
        min(each.memory.peak for each in (step, *others)),
        most,
        {axis: step.sent(axis) for axis in axes},
    )


CASES = [
    ("Llama-3-8B", (1, 2), {}, "32-true"),
    ("Llama-3-8B", (2, 2), {}, "bf16-true"),
    ("pythia-14m", (1, 2), {"activation_checkpointing": "full"}, "32-true"),
    ("falcon-40b", (2, 1), {"reshard_after_forward": False}, "32-true"),
    ("phi-2", (1, 2), {"sequence_parallel": False, "loss_parallel": False}, "bf16-true"),
    ("Llama-2-7b-hf", (2, 2), {"activation_checkpointing": "selective"}, "bf16-mixed"),
]


@pytest.mark.swept(lambda p: (p["name"], p["sizes"]) != ("Llama-3-8B", (1, 2)))
@pytest.mark.parametrize(("name", "sizes", "options", "precision"), CASES)
def test_estimate_is_what_a_real_step_needs(pool, name, sizes, options, precision) -> None:
    peak, most, sent = pool(sizes[0] * sizes[1])(real_step, name, sizes, options, precision)
    estimated = estimated_step(name, sizes, options, precision)
    assert estimated.memory.peak == pytest.approx(peak, rel=0.03)
    for kind in ("parameters", "gradients", "optimizer state", "activations"):
        assert estimated.memory.most[kind] == pytest.approx(most[kind], rel=0.03), kind
    assert {axis: estimated.sent(axis) for axis in sent} == sent


@pytest.mark.swept(lambda p: p["sizes"] != (1, 2))
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_estimate_of_adapters(pool, sizes) -> None:
    """Frozen weights have no gradients and no state, send none, and keep nothing."""
    options = {"fused_loss": True}
    peak, most, sent = pool(sizes[0] * sizes[1])(real_step, "Llama-3-8B", sizes, options, "32-true", True)
    estimated = estimated_step("Llama-3-8B", sizes, options, adapted=True)
    assert estimated.memory.peak == pytest.approx(peak, rel=0.03)
    model = make_model(config_of("Llama-3-8B", True))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert estimated.least["gradients"] == pytest.approx(4 * trained / (sizes[0] * sizes[1]), rel=0.01)
    for kind in ("parameters", "gradients", "optimizer state", "activations"):
        assert estimated.memory.most[kind] == pytest.approx(most[kind], rel=0.03), kind
    assert {axis: estimated.sent(axis) for axis in sent} == sent
    whole = estimated_step("Llama-3-8B", sizes, options)
    for kind in ("gradients", "optimizer state"):
        assert estimated.memory.most[kind] < 0.3 * whole.memory.most[kind], kind
    scattered = [
        sum(each.sent for each in found.collectives if (each.axis, each.kind) == ("data_parallel", "reduce-scatter"))
        for found in (estimated, whole)
    ]
    assert sizes[0] == 1 or 0 < scattered[0] < 0.3 * scattered[1]


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_estimate_of_a_quantized_base(pool, sizes) -> None:
    options = {"fused_loss": True, "quantize": "bnb.nf4"}
    peak, most, sent = pool(sizes[0] * sizes[1])(real_step, "Llama-3-8B", sizes, options, "32-true", True)
    estimated = estimated_step("Llama-3-8B", sizes, options, adapted=True)
    assert estimated.memory.peak == pytest.approx(peak, rel=0.03)
    assert estimated.memory.most["parameters"] == pytest.approx(most["parameters"], rel=0.03)
    assert {axis: estimated.sent(axis) for axis in sent} == sent
    least = estimated.least["parameters"]
    assert least <= estimated.memory.most["parameters"] < 1.2 * least  # of half of the adapters each rank has all
    dense = estimated_step("Llama-3-8B", sizes, {"fused_loss": True}, adapted=True)
    assert estimated.memory.most["activations"] == pytest.approx(dense.memory.most["activations"], rel=0.01)


def estimated_step(
    name: str,
    sizes: tuple[int, int],
    options: dict[str, Any],
    precision: Precision = "32-true",
    *,
    adapted: bool = False,
) -> Any:
    return estimate(
        config_of(name, adapted),
        fabric_tp.litgpt(**options),
        data_parallel_size=sizes[0],
        tensor_parallel_size=sizes[1],
        micro_batch_size=BATCH,
        precision=precision,
    )


def test_another_option_would_be_noticed(pool) -> None:
    """The tolerance is far below what options make of it."""
    peak, _, _ = pool(2)(real_step, "Llama-3-8B", (1, 2), {}, "32-true")
    for option in ("lean", "sequence_parallel"):
        assert estimated_step("Llama-3-8B", (1, 2), {option: False}).memory.peak > 1.05 * peak, option


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_estimate_is_what_a_gpu_allocates() -> None:
    """One rank's real tensors, with collectives that go nowhere."""
    length, sizes = 2048, {"data_parallel_size": 1, "tensor_parallel_size": 4}
    with fake_mesh(1, 4, "cuda") as cuda_mesh:
        with torch.device("meta"), default_dtype(torch.bfloat16):
            model = GPT.from_name("Llama-3.2-1B")
        model.max_seq_length = length
        fabric_tp.litgpt()(model, cuda_mesh)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tokens = torch.zeros(1, length, dtype=torch.int64, device="cuda")
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            fabric_tp.cross_entropy(model(tokens), tokens).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        allocated = torch.cuda.max_memory_allocated()
    estimated = estimate("Llama-3.2-1B", sequence_length=length, **sizes)
    assert estimated.memory.peak == pytest.approx(allocated, rel=0.10)


def test_large_models_and_meshes_take_no_memory_and_no_processes() -> None:
    """Parameters, gradients and AdamW's state of 70 billion parameters on 512 ranks, by hand."""
    config = load_config("Llama-3-70B")
    config.n_layer = 4
    found = estimate(config, tensor_parallel_size=8, data_parallel_size=64, sequence_length=1024)
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in GPT(config).parameters())
    for kind, each in (("parameters", 2), ("gradients", 2), ("optimizer state", 4)):
        assert found.memory.most[kind] == pytest.approx(each * numbers / 512, rel=0.01), kind
        assert found.least[kind] == pytest.approx(each * numbers / 512, rel=1e-6), kind


def test_experts_get_equal_shares() -> None:
    config = litgpt_config("Mixtral-8x7B-v0.1", **WIDE)
    found = estimate(config, tensor_parallel_size=2, micro_batch_size=BATCH, precision="32-true")
    assert found.memory.most["activations"] > found.least["activations"]


def test_leaves_no_trace() -> None:
    config = config_of("pythia-14m")
    before = copy.deepcopy(config)
    torch.manual_seed(3)
    expected, excepthook = torch.rand(1), sys.excepthook
    torch.manual_seed(3)
    estimate(config, data_parallel_size=2, tensor_parallel_size=2)
    assert torch.rand(1) == expected
    assert config == before
    assert not dist.is_initialized()
    assert torch.get_default_dtype() == torch.float32
    assert sys.excepthook is excepthook
    estimated_step("pythia-14m", (1, 2), {})  # and again, with another mesh


def test_leaves_no_mesh_behind() -> None:
    """What is parallelized afterwards, with parameters of the same shapes, is on its own mesh, with its own groups."""
    for _ in range(2):
        with fake_mesh(2, 2) as own:
            model = fabric_tp.litgpt()(meta_model(config_of("pythia-14m")), own)
            assert all(parameter.device_mesh._get_root_mesh() is own for parameter in model.parameters())


def estimate_beside_others() -> None:
    estimated_step("pythia-14m", (1, 2), {})


def test_leaves_the_process_group_of_others_alone(pool) -> None:
    with pytest.raises(AssertionError, match=r"This process has a process group(.|\n)*fabric-tp estimate"):
        pool(2)(estimate_beside_others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_parallel_size": 7}, "the sizes that work"),
        ({"data_parallel_size": 0}, "data_parallel_size=0"),
        ({"precision": "16-true"}, "precision='16-true'"),
    ],
)
def test_mistakes(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(litgpt_config("Llama-3-8B"), **arguments)


def test_checkpoint_directory(tmp_path) -> None:
    save_config(litgpt_config("Llama-3-8B"), tmp_path)
    assert load_config(tmp_path) == litgpt_config("Llama-3-8B")


def test_unknown_models_get_names_like_theirs() -> None:
    with pytest.raises(ValueError, match="Llama-3-8B"):
        load_config("Llama-3-7B")


def test_table_and_json_and_kinds_that_add_up() -> None:
    found = estimated_step("Llama-3-8B", (2, 2), {})
    assert "collective buffers" in str(found)
    assert "tensor parallel" in str(found)
    memory = found.memory
    assert json.loads(json.dumps(found.to_dict()))["peak"] == memory.peak
    assert sum(memory.at_peak.values()) == memory.peak
    assert memory.phase in ("forward", "head and loss", "backward", "clipping", "optimizer")


@pytest.mark.sweep
def test_fit_takes_the_first_option_that_fits() -> None:
    config, sizes = litgpt_config("Llama-3-8B", **{**WIDE, "n_layer": 6}), {"micro_batch_size": 16}
    memory = 2**40
    for checkpointing in ("none", "selective", "full"):  # with one byte less than the one before takes
        found = list(fit(config, memory=memory, devices=2, **sizes))
        assert [(each.data_parallel_size, each.tensor_parallel_size) for each in found][-1] == (1, 2)
        assert found[-1].parallelize.activation_checkpointing == checkpointing
        assert len(found) == 2 or checkpointing != "none"
        memory = found[-1].memory.peak - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp8"}, r"precision='fp8' is not known"),
        ({"devices": 0}, r"devices=0 must be at least 1"),
        ({"micro_batch_size": 0}, r"micro_batch_size=0 must be at least 1"),
    ],
)
def test_mistakes_where_nothing_fits(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        list(fit(litgpt_config("Llama-3-8B", **WIDE), memory=1, **{"devices": 4, **arguments}))


def test_what_cannot_fit_is_not_counted(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["fabric_tp.measure.fit"], "estimate", None)
    assert list(fit(litgpt_config("Llama-3-8B", **WIDE), memory=1, devices=4)) == []


@pytest.mark.swept(lambda p: (p["name"], p["precision"]) != ("Llama-3-8B", "bf16-true"))
@pytest.mark.parametrize("name", ["Llama-3-8B", "Mixtral-8x7B-v0.1", "pythia-14m", "falcon-40b"])
@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("checkpointing", get_args(ActivationCheckpointing))
@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_the_limit_is_below_what_is_counted(name, precision, checkpointing, reshard_after_forward) -> None:
    for overlap in (False, True):
        parallelize = fabric_tp.litgpt(
            activation_checkpointing=checkpointing, reshard_after_forward=reshard_after_forward, overlap=overlap
        )
        sizes: dict[str, Any] = {"tensor_parallel_size": 2, "data_parallel_size": 2, "micro_batch_size": 8}
        found = estimate(litgpt_config(name, **WIDE), parallelize, **sizes, precision=precision)
        assert found.least_peak <= found.memory.peak


@pytest.mark.sweep
def test_cheapest_sends_the_fewest_bytes_for_a_token() -> None:
    config = litgpt_config("Llama-3-8B", **WIDE)
    found = [estimate(config, tensor_parallel_size=size, micro_batch_size=BATCH) for size in (4, 2, 1)]
    assert [each.tensor_parallel_size for each in cheapest(found)] == [1, 2, 4]
