"""The factories with Lightning's own ModelParallelStrategy, in a training loop that knows nothing of them."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.strategies import ModelParallelStrategy
from litgpt import GPT
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

import fabric_tp
from fabric_tp.shards import gather_shards
from fabric_tp.testing.ranks import mesh
from tests.fabric import as_under_torchrun
from tests.models import LENGTH, VOCABULARY, build, litgpt_config

STEPS, ACCUMULATE, BATCH = 3, 2, 4
MESHES = [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2)]


def fabric_on_this_rank(
    sizes: tuple[int, int], parallelize_fn: fabric_tp.Parallelize, precision: str | None
) -> L.Fabric:
    """As under torchrun, which the caller provides."""
    dp, tp = sizes
    strategy = ModelParallelStrategy(parallelize_fn=parallelize_fn, data_parallel_size=dp, tensor_parallel_size=tp)
    fabric = L.Fabric(accelerator="cpu", devices=dp * tp, strategy=strategy, precision=precision)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def train(
    sizes: tuple[int, int], on_meta: bool, options: dict, precision: str | None = None, checkpoint: Path | None = None
) -> list[float]:
    """Losses and gradient norms of a few steps, and a sum over the weights at the end."""
    with as_under_torchrun():
        fabric = fabric_on_this_rank(sizes, fabric_tp.litgpt(**options), precision)
        fabric.seed_everything(7, verbose=False)
        if on_meta:
            with fabric.init_module(empty_init=True):
                model: nn.Module = GPT(litgpt_config("Llama-3-8B"))
        else:
            model = build("Llama-3-8B")
        model = fabric.setup(model)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5))
        generator = torch.Generator().manual_seed(3)
        rank = fabric.strategy.device_mesh.get_local_rank("data_parallel")  # type: ignore[attr-defined]
        result: list[float] = []
        for _ in range(STEPS):
            for micro_batch in range(ACCUMULATE):
                tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
                mine = tokens.chunk(sizes[0])[rank]
                with fabric.no_backward_sync(model, enabled=micro_batch < ACCUMULATE - 1):
                    loss = fabric_tp.cross_entropy(model(mine[:, :-1].contiguous()), mine[:, 1:].contiguous())
                    fabric.backward(loss / ACCUMULATE)
                result.append(float(fabric.all_reduce(loss.detach())))
            norm = fabric.clip_gradients(model, optimizer, max_norm=0.5)
            assert isinstance(norm, DTensor)
            result.append(float(norm.full_tensor()))
            optimizer.step()
            optimizer.zero_grad()
        if checkpoint:
            fabric.save(checkpoint, {"model": model, "optimizer": optimizer, "step": STEPS})
        return [*result, *[float(gather_shards(p).double().abs().sum()) for p in model.parameters()]]


def resume(sizes: tuple[int, int], checkpoint: Path) -> list[float]:
    with as_under_torchrun():
        fabric = fabric_on_this_rank(sizes, fabric_tp.litgpt(), None)
        with fabric.init_module(empty_init=True):
            model: nn.Module = GPT(litgpt_config("Llama-3-8B"))
        model = fabric.setup(model)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5))
        state = {"model": model, "optimizer": optimizer, "step": 0}
        fabric.load(checkpoint, state)
        assert state["step"] == STEPS
        momenta = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
        return [float(gather_shards(t).double().abs().sum()) for t in [*model.parameters(), *momenta]]


@pytest.mark.swept(lambda p: not p["on_meta"])
@pytest.mark.parametrize("on_meta", [False, True], ids=["real", "meta"])
def test_training_is_the_same_on_every_mesh(pool, on_meta) -> None:
    one, *others = [pool(dp * tp)(train, (dp, tp), on_meta, {}) for dp, tp in MESHES]
    for other in others:
        assert other == pytest.approx(one, rel=1e-5)


def test_real_model_equals_plain_training(pool) -> None:
    """Not only each other: the loop without Fabric and without this library."""
    model = build("Llama-3-8B")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    generator = torch.Generator().manual_seed(3)
    expected: list[float] = []
    for _ in range(STEPS):
        for _ in range(ACCUMULATE):
            tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            (loss / ACCUMULATE).backward()
            expected.append(loss.item())
        expected.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    assert pool(2)(train, (1, 2), False, {})[: len(expected)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.swept(lambda p: p["sizes"] != (2, 2))
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 2)])
def test_mixed_precision_computes_in_bf16_and_keeps_fp32(pool, sizes) -> None:
    exact = pool(1)(train, (1, 1), True, {})
    mixed = pool(sizes[0] * sizes[1])(train, sizes, True, {"mixed_precision": "bf16-mixed"})
    assert mixed == pytest.approx(exact, rel=3e-2)
    assert mixed != pytest.approx(exact, rel=1e-5)


@pytest.mark.swept(lambda p: p["precision"] == "bf16-true")
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_precision_of_fabric(pool, precision) -> None:
    one = pool(1)(train, (1, 1), True, {}, precision)
    two = pool(2)(train, (1, 2), True, {}, precision)
    assert two == pytest.approx(one, rel=3e-2)


def test_checkpoint_moves_to_other_meshes(pool, tmp_path) -> None:
    weights = pool(2)(train, (1, 2), True, {}, checkpoint=tmp_path / "checkpoint")[STEPS * (ACCUMULATE + 1) :]
    two = pool(2)(resume, (1, 2), tmp_path / "checkpoint")
    assert two[: len(weights)] == weights
    assert pool(4)(resume, (2, 2), tmp_path / "checkpoint") == pytest.approx(two, rel=1e-6)
    assert pool(1)(resume, (1, 1), tmp_path / "checkpoint") == pytest.approx(two, rel=1e-6)


def torch_loss_parallel(sizes: tuple[int, int]) -> tuple[float, float]:
    with as_under_torchrun():
        fabric = fabric_on_this_rank(sizes, fabric_tp.litgpt(), None)
        model = fabric.setup(build("Llama-3-8B"))
        tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(4))
        losses = []
        for ours in (True, False):
            model.zero_grad()
            if ours:
                fabric.backward(loss := fabric_tp.cross_entropy(model(tokens), tokens))
            else:
                with loss_parallel():
                    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
                    fabric.backward(loss)
            grads = sum(float(gather_shards(p.grad).double().abs().sum()) for p in model.parameters())  # type: ignore[arg-type]
            losses += [float(loss.full_tensor() if isinstance(loss, DTensor) else loss), grads]
        assert losses[:2] == pytest.approx(losses[2:], rel=1e-6)
        return losses[0], losses[1]


def test_torch_loss_parallel_works_on_the_logits(pool) -> None:
    pool(2)(torch_loss_parallel, (1, 2))


def buffers_after_parallelizing() -> list[float]:
    """Of a model whose buffers each rank has in another order, as if they were made from a set."""
    model = build("llama")
    names = ["first", "second", "third"]
    for name in names if torch.distributed.get_rank() == 0 else reversed(names):
        model.register_buffer(name, torch.tensor(float(names.index(name))))
    fabric_tp.llama()(model, mesh(1, 2))
    values = torch.stack([model.get_buffer(name) for name in names])
    gathered = [torch.empty_like(values) for _ in range(2)]
    torch.distributed.all_gather(gathered, values)
    return torch.cat(gathered).tolist()


def test_buffers_in_another_order_on_each_rank_are_not_swapped(pool) -> None:
    assert pool(2)(buffers_after_parallelizing) == [0, 1, 2] * 2


def cut_by_the_model(sequence_parallel: bool, by_position: bool) -> int:
    model = fabric_tp.litgpt(sequence_parallel=sequence_parallel)(build("Llama-3-8B"), mesh(1, 2))
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    if by_position:
        return len(model(tokens, None, None, LENGTH // 2))
    return len(model(tokens, lm_head_chunk_size=LENGTH // 2))


@pytest.mark.parametrize("by_position", [False, True])
def test_pieces_of_the_sequence_are_refused_under_sequence_parallelism(pool, by_position) -> None:
    assert pool(2)(cut_by_the_model, False, by_position) == 2
    with pytest.raises(AssertionError, match=r"lm_head_chunk_size=8 cuts the sequence .* fused_loss=True"):
        pool(2)(cut_by_the_model, True, by_position)
