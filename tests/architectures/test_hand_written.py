"""Hand-written models with the options of the scripts that people run them with."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import fabric_tp
from fabric_tp.architectures import recognise
from fabric_tp.measure.step import default_dtype
from fabric_tp.shards import gather_shards
from fabric_tp.testing.parity import TOLERANCE, Report, compare
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import randomize
from tests.architectures.example_llama import LightningTransformer, PyTorchTransformer
from tests.architectures.hand_written import PADDING, FastLlama, LlamaForCausalLM, NanoGPT, causal_and_padding
from tests.parity import assert_equal, differences_of

VOCABULARY, WIDTH, LENGTH, STEPS = 96, 96, 12, 4


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(LlamaForCausalLM(VOCABULARY, WIDTH, num_layers=2, max_length=2 * LENGTH))


def batch(rows: int, length: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    """Rows of two lengths in turn, padded at the end: all halves of a batch have equally many targets."""
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    lengths = length - torch.arange(rows) % 2 * 4
    tokens = tokens.masked_fill(torch.arange(length) >= lengths[:, None], PADDING)
    return {"input_ids": tokens, "attn_mask": causal_and_padding(tokens, torch.get_default_dtype())}


@pytest.mark.swept(lambda p: p["sizes"] != (1, 2) or not p["sequence_parallel"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("sizes", [(1, 2), (1, 3), (1, 4), (2, 2)], ids=str)
def test_equals_one_device(pool, sizes, sequence_parallel) -> None:
    parallelize_fn = fabric_tp.auto(sequence_parallel=sequence_parallel)
    assert_equal(pool, build, parallelize_fn, sizes, inputs=batch(2 * sizes[0]), steps=3)


def test_a_length_that_three_ranks_do_not_divide(pool) -> None:
    inputs = {"input_ids": batch(2)["input_ids"][:, :-2], "attn_mask": batch(2)["attn_mask"][..., :-2, :-2]}
    assert inputs["input_ids"].shape[1] % 3
    assert_equal(pool, build, fabric_tp.auto(), (1, 3), inputs=inputs)


def undivided_heads(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.hidden_size = WIDTH  # as if nobody had said that it counts the features of all heads


def test_an_undivided_count_is_noticed(pool) -> None:
    with pytest.raises(AssertionError, match="is invalid for input of size"):
        differences_of(pool, build, fabric_tp.auto(), inputs=batch(2), break_model=undivided_heads)


def test_is_recognised() -> None:
    assert recognise(build()).name == "base_model"


def optimization(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, warmed up linearly and then along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=2)
    cosine = CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=1e-4)
    return optimizer, SequentialLR(optimizer, [warm_up, cosine], milestones=[2])


def by_torch(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=PADDING)


def by_fabric_tp(logits: Tensor, targets: Tensor) -> Tensor:
    return fabric_tp.cross_entropy(logits, targets, ignore_index=PADDING)


LOSSES = {"torch": (by_torch, loss_parallel), "fabric_tp": (by_fabric_tp, nullcontext)}


def train(model: nn.Module, sizes: tuple[int, int], loss: str, first_step: int = 0, folder: Path | None = None) -> list:
    """The loop of the scripts. Of each step the loss, of all data-parallel ranks together, and the clipped norm."""
    compute, context = LOSSES[loss] if sizes != (1, 1) else (by_torch, nullcontext)
    rank = mesh(*sizes).get_local_rank("data_parallel") if sizes != (1, 1) else 0
    optimizer, scheduler = optimization(model)
    if folder and first_step:
        load(folder, model, optimizer)
        for _ in range(first_step):
            scheduler.step()
    figures: list[Any] = []
    for step in range(first_step, STEPS):
        whole = batch(4, seed=step)
        mine = {name: tensor.chunk(sizes[0])[rank] for name, tensor in whole.items()}
        with context():
            value = compute(model(**mine), torch.roll(mine["input_ids"], -1, 1))
            value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        value, norm = (each.full_tensor() if isinstance(each, DTensor) else each for each in (value.detach(), norm))
        if sizes[0] > 1:
            torch.distributed.all_reduce(value, group=mesh(*sizes).get_group("data_parallel"))
        figures.append((float(value) / sizes[0], float(norm)))
        if folder and step == STEPS // 2 - 1:
            save(folder, model, optimizer)
    return figures


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def trained_in_parallel(sizes: tuple[int, int], loss: str) -> dict[str, float]:
    """How far losses, norms and weights are from one device's, relative to them."""
    reference = build()
    model: nn.Module = fabric_tp.auto()(copy.deepcopy(reference), mesh(*sizes))
    expected, figures = train(reference, (1, 1), loss), train(model, sizes, loss)
    off = {"figures": float((torch.tensor(figures) / torch.tensor(expected) - 1).abs().max())}
    for name, parameter in model.named_parameters():
        whole, right = gather_shards(parameter), reference.get_parameter(name)
        off[name] = float((whole - right).abs().max() / right.abs().max())
    return off


@pytest.mark.swept(lambda p: p["sizes"] != (2, 2) or p["loss"] == "torch")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [(1, 2), (1, 3), (2, 2)], ids=str)
def test_the_scripts_training(pool, sizes, loss) -> None:
    """Masks, padded rows, ignored targets, warm-up and cosine, clipping; torch's loss_parallel and this package's."""
    off = pool(sizes[0] * sizes[1])(trained_in_parallel, sizes, loss)
    assert max(off.values()) <= TOLERANCE, off


def continued(folder: Path, loss: str) -> tuple[list, list]:
    """Saved by DCP halfway, loaded into a model of other values and another layout, continued."""
    whole = train(fabric_tp.auto()(build(), mesh(1, 2)), (1, 2), loss, folder=folder)
    model = fabric_tp.auto(sequence_parallel=False)(randomize(build(), seed=5), mesh(1, 2))
    return whole[STEPS // 2 :], train(model, (1, 2), loss, STEPS // 2, folder)


def test_distributed_checkpoint(pool, tmp_path) -> None:
    expected, figures = pool(2)(continued, tmp_path, "fabric_tp")
    assert len(figures) == STEPS // 2
    torch.testing.assert_close(torch.tensor(figures), torch.tensor(expected), rtol=TOLERANCE, atol=0)


def in_bfloat16(sizes: tuple[int, int], loss: str) -> tuple[set[torch.dtype], list, list]:
    with default_dtype(torch.bfloat16):
        reference = build()
        model = fabric_tp.auto()(copy.deepcopy(reference), mesh(*sizes))
        figures = train(model, sizes, loss)
        return {parameter.dtype for parameter in model.parameters()}, train(reference, (1, 1), loss), figures


@pytest.mark.swept(lambda p: p["loss"] == "torch")
@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_as_default(pool, loss) -> None:
    dtypes, expected, figures = pool(2)(in_bfloat16, (1, 2), loss)
    assert dtypes == {torch.bfloat16}
    torch.testing.assert_close(torch.tensor(figures), torch.tensor(expected), rtol=2e-2, atol=0)


def test_tables_on_the_meta_device_are_refused() -> None:
    """They are made in the constructor and by nothing else: zeros in their place would train to nan."""
    with torch.device("meta"):
        model = LlamaForCausalLM(VOCABULARY, WIDTH, num_layers=1)
    with pytest.raises(ValueError, match=r"base_model\.rotary_emb \(RotaryEmbedding\) is on the meta device"):
        fabric_tp.random.initialize(model, torch.device("cpu"), 0)


def build_nano() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(NanoGPT(VOCABULARY))


def build_fast() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(FastLlama(VOCABULARY))


def its_own_loss(output: tuple[Tensor, Tensor], inputs: object) -> Tensor:
    return output[1]


@pytest.mark.swept(lambda p: p["size"] == 4)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_nanogpt(pool, size, sequence_parallel) -> None:
    assert recognise(build_nano()).name == "gpt2"
    parallelize_fn = fabric_tp.auto(sequence_parallel=sequence_parallel, loss_parallel=False)
    tokens = batch(4)["input_ids"]
    inputs = {"idx": tokens, "targets": tokens.roll(-1, 1)}
    report = Report(pool(size)(compare, build_nano, parallelize_fn, inputs, its_own_loss, (1, size), 3))
    assert report.equal, str(report)


@pytest.mark.swept(lambda p: p["size"] == 2)
@pytest.mark.parametrize("size", [2, 4])
def test_fused_llama(pool, size) -> None:
    assert recognise(build_fast()).name == "fused_llama"
    assert_equal(pool, build_fast, fabric_tp.auto(), (1, size))


def build_example(cls: type[nn.Module], **options: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(cls(VOCABULARY, **options))


@pytest.mark.swept(lambda p: p["sizes"] == (1, 4))
@pytest.mark.parametrize("sizes", [(1, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("cls", [PyTorchTransformer, LightningTransformer])
def test_the_llamas_of_the_examples(pool, cls, sizes) -> None:
    build_model = partial(build_example, cls)
    assert recognise(build_model()).name == "llama"
    tokens = torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    assert_equal(pool, build_model, fabric_tp.auto(), sizes, inputs=tokens, steps=3)
