"""What Fabric's own strategy does at each of its edges, and what ours does there."""

from __future__ import annotations

import os
import random
from pathlib import Path
from unittest import mock

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

import fabric_tp
from fabric_tp.checkpoint.atomic import replacing
from fabric_tp.shards import gather_shards
from fabric_tp.strategy.clip import clip_grad_norm
from fabric_tp.testing.ranks import mesh as mesh_on_ranks
from tests.fabric import batch, on_ranks
from tests.models import build

BOTH = pytest.mark.parametrize("ours", [False, True], ids=["Fabric's", "ours"])


def step_loss(fabric: L.Fabric, model: nn.Module, size: int = 4, seed: int = 0) -> Tensor:
    inputs, targets = batch(fabric, size, seed)
    return fabric_tp.cross_entropy(model(inputs), targets)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: gather_shards(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: gather_shards(p).clone() for name, p in model.named_parameters()}


# Sizes


def fabric_of(strategy: ModelParallelStrategy, devices: int = 4, num_nodes: int = 1) -> tuple[int, int]:
    L.Fabric(accelerator="cpu", devices=devices, num_nodes=num_nodes, strategy=strategy)
    return strategy._data_parallel_size, strategy._tensor_parallel_size  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"tensor_parallel_size": 2}, (2, 2)), ({"data_parallel_size": 4}, (4, 1)), ({}, (1, 4))],
)
def test_missing_size_is_inferred(given, expected) -> None:
    assert fabric_of(fabric_tp.TensorParallelStrategy(**given)) == expected


def test_sizes_default_to_tensor_parallel_machines() -> None:
    assert fabric_of(fabric_tp.TensorParallelStrategy(), devices=4, num_nodes=2) == (2, 4)


def test_missing_size_breaks_fabrics_own_strategy(pool) -> None:
    with pytest.raises(AssertionError, match="multiplied should equal the world size"):
        pool(2)(enter, ModelParallelStrategy, {"tensor_parallel_size": 1})


def enter(cls: type[ModelParallelStrategy], options: dict) -> None:
    from tests.fabric import torchrun_environment

    with mock.patch.dict(os.environ, torchrun_environment()):
        fabric = L.Fabric(accelerator="cpu", devices=2, strategy=cls(fabric_tp.litgpt(), **options))
        fabric.launch()


def test_wrong_sizes_are_refused_before_processes_meet() -> None:
    strategy = fabric_tp.TensorParallelStrategy(data_parallel_size=2, tensor_parallel_size=3)
    with pytest.raises(ValueError, match=r"2 x 3.*4 processes.*1 x 4, 2 x 2, 4 x 1|2 x 3.*4 processes"):
        fabric_of(strategy)


@pytest.mark.parametrize(
    "environment",
    [
        {"LOCAL_RANK": "0", "RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0", "RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"},
    ],
    ids=["world", "machine"],
)
@BOTH
def test_torchrun_with_other_numbers(environment, ours) -> None:
    names = {**environment, "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with mock.patch.dict(os.environ, names):
        if not ours:
            fabric_of(ModelParallelStrategy(fabric_tp.litgpt()))  # and hangs when processes are to meet
            return
        with pytest.raises(ValueError, match=r"expects 4 processes.*has started [24], 2 of them on this one"):
            fabric_of(fabric_tp.TensorParallelStrategy())


def test_is_a_model_parallel_strategy_with_a_name() -> None:
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="tensor_parallel")
    assert isinstance(fabric.strategy, fabric_tp.TensorParallelStrategy)
    assert isinstance(fabric.strategy, ModelParallelStrategy)


# fabric.setup(model, optimizer)


def setup_together(sizes: tuple[int, int], ours: bool, on_meta: bool = False) -> float:
    """How far three steps move the weights."""
    with on_ranks(sizes, ours) as fabric:
        fabric.seed_everything(1, verbose=False)
        model = build("pythia-14m").requires_grad_(True)
        model.lm_head.weight.requires_grad_(False)  # type: ignore[union-attr]
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.01},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-4)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        model, optimizer = fabric.setup(model, optimizer)
        before = weights(model)
        for step in range(3):
            fabric.backward(step_loss(fabric, model, seed=step))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return float(sum((after - before[name]).double().abs().sum() for name, after in weights(model).items()))


def test_model_and_optimizer_in_one_call(pool) -> None:
    assert pool(2)(setup_together, (1, 2), False) == 0, "if Fabric has learnt it, so much the better"
    one = pool(1)(setup_together, (1, 1), True)
    assert one > 1
    assert pool(2)(setup_together, (1, 2), True) == pytest.approx(one, rel=1e-4)
    assert pool(4)(setup_together, (2, 2), True) == pytest.approx(one, rel=1e-4)


def setup_with_a_used_optimizer() -> None:
    with on_ranks((1, 1)) as fabric:
        model = build("pythia-14m")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(batch(fabric, 1)[0]).sum().backward()
        optimizer.step()
        fabric.setup(model, optimizer)


def setup_with_another_models_optimizer() -> None:
    with on_ranks((1, 1)) as fabric:
        fabric.setup(build("pythia-14m"), torch.optim.SGD(build("pythia-14m").parameters(), lr=0.1))


def test_what_cannot_be_repointed_is_refused(pool) -> None:
    with pytest.raises(AssertionError, match="has already taken a step"):
        pool(1)(setup_with_a_used_optimizer)
    with pytest.raises(AssertionError, match="parameters that are not the model's"):
        pool(1)(setup_with_another_models_optimizer)


# Precision


class DtypesOfLogits(TorchDispatchMode):
    """The dtypes in which anything of the size of the logits is made."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.found = shape, set[torch.dtype]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and tuple(out.shape) == self.shape:
            self.found.add(out.dtype)
        return out


def dtypes_of_logits(ours: bool, precision: str) -> tuple[torch.dtype, torch.dtype, set[torch.dtype]]:
    """Of the parameters, of the output, and of all that is made on the way there, but by DTensor operations."""
    with on_ranks((1, 2), ours, precision) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        inputs, _ = batch(fabric, 2)
        local = (*inputs.shape, model.lm_head.weight.to_local().shape[0])
        (kept,) = {p.dtype for p in model.parameters()}  # FSDP2 shows others after a forward
        with DtypesOfLogits(local) as logits:
            out = model(inputs)
        return kept, out.dtype, logits.found


@pytest.mark.parametrize(("precision", "kept"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_logits_are_not_copied_to_fp32(pool, precision, kept) -> None:
    assert pool(2)(dtypes_of_logits, False, precision)[:2] == (kept, torch.float32)
    assert pool(2)(dtypes_of_logits, True, precision) == (kept, torch.bfloat16, {torch.bfloat16})


def test_fp16_with_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not support.*16-mixed"):
        L.Fabric(accelerator="cpu", strategy="tensor_parallel", precision="16-mixed")
    with pytest.raises(ValueError, match=r"scales the loss.*bf16-mixed"):
        L.Fabric(accelerator="cpu", strategy="tensor_parallel", plugins=MixedPrecision("16-mixed", "cpu"))


# Accumulation


def gradient_after_not_skipping(ours: bool) -> float:
    """How far ranks of a data-parallel group are apart after a backward that follows ``enabled=False``."""
    with on_ranks((2, 1), ours) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        with fabric.no_backward_sync(model, enabled=False):
            fabric.backward(step_loss(fabric, model))
        model.zero_grad()
        fabric.backward(step_loss(fabric, model))
        try:
            found = gradients(model)
        except RuntimeError:
            return 1.0
        return float(len(found) < len(list(model.parameters())))


def test_synchronisation_is_restored(pool) -> None:
    assert pool(2)(gradient_after_not_skipping, False) > 0
    assert pool(2)(gradient_after_not_skipping, True) == 0


def nested_synchronisation() -> list[bool]:
    with on_ranks((1, 1)) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        control = fabric.strategy._backward_sync_control._synchronises
        inner = model._forward_module
        states = []
        with fabric.no_backward_sync(model):
            with fabric.no_backward_sync(model, enabled=False):
                states.append(control[inner])
            states.append(control[inner])
        return [*states, control[inner]]


def test_synchronisation_nests(pool) -> None:
    assert pool(1)(nested_synchronisation) == [True, False, True]


def accumulated(sizes: tuple[int, int], micro_batches: int) -> dict[str, Tensor]:
    """Gradients of 8 samples, summed."""
    with on_ranks(sizes, parallelize_fn=fabric_tp.llama()) as fabric:
        model = fabric.setup(build("llama", torch.float64))  # litgpt's RMSNorm would compute in fp32
        inputs, targets = batch(fabric, 8)
        for i, (x, y) in enumerate(zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True)):
            with fabric.no_backward_sync(model, enabled=i < micro_batches - 1):
                fabric.backward(fabric_tp.cross_entropy(model(x), y, reduction="sum"))
        return gradients(model)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 2)])
def test_micro_batches_add_up_to_the_batch(pool, sizes) -> None:
    ranks = pool(sizes[0] * sizes[1])
    whole, parts = ranks(accumulated, sizes, 1), ranks(accumulated, sizes, 4 // sizes[0])
    for name, gradient in whole.items():
        assert torch.allclose(parts[name], gradient, rtol=1e-9, atol=1e-11), name


def accumulated_twice(sizes: tuple[int, int], at_once: bool) -> bool:
    """The same micro-batch twice is bitwise twice the gradient, since doubling does not round."""
    with on_ranks(sizes) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        inputs, targets = batch(fabric, 4)
        for i in range(1 if at_once else 2):
            with fabric.no_backward_sync(model, enabled=not at_once and i == 0):
                loss = fabric_tp.cross_entropy(model(inputs), targets)
                fabric.backward(loss * 2 if at_once else loss)
        result = gradients(model)
        return result  # type: ignore[return-value]


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)])
def test_accumulation_is_bitwise_where_sums_allow(pool, sizes) -> None:
    ranks = pool(sizes[0] * sizes[1])
    twice, doubled = ranks(accumulated_twice, sizes, False), ranks(accumulated_twice, sizes, True)
    assert all(torch.equal(twice[name], gradient) for name, gradient in doubled.items())


# Clipping


class Mixed(nn.Module):
    """Parameters of every kind, with the gradient that the test gives them."""

    def __init__(self, mesh) -> None:
        super().__init__()
        tp = mesh["tensor_parallel"]
        places = {"split": [Shard(0)], "same": [Replicate()], "other": [Shard(1)]}
        for name, place in places.items():
            self.register_parameter(name, nn.Parameter(distribute(full(name), tp, place)))
        self.plain = nn.Parameter(full("plain"))
        self.fsdp = nn.Module()
        self.fsdp.weight = nn.Parameter(distribute(full("fsdp"), tp, [Shard(0)]))
        fully_shard(self.fsdp, mesh=mesh["data_parallel"])


def full(name: str) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(len(name) + ord(name[0])))


def distribute(whole: Tensor, mesh, places) -> DTensor:
    local = whole
    for dim, place in enumerate(places):
        if isinstance(place, Shard):
            local = local.chunk(mesh.size(dim), place.dim)[mesh.get_local_rank(dim)]
    return DTensor.from_local(local.clone(), mesh, places, run_check=False)


def clip_mixed(sizes: tuple[int, int], norm_type: float, ours: bool) -> dict[str, Tensor]:
    mesh = mesh_on_ranks(*sizes)
    model = Mixed(mesh)
    for name, parameter in model.named_parameters():
        grad = parameter.detach().clone()
        if name == "same" and isinstance(grad, DTensor) and mesh["tensor_parallel"].size() > 1:
            first = mesh["tensor_parallel"].get_local_rank() == 0
            grad = DTensor.from_local(grad.to_local() * first, grad.device_mesh, [Partial()], run_check=False)
        parameter.grad = grad
    if ours:
        norm = clip_grad_norm(model.parameters(), mesh, max_norm=1.0, norm_type=norm_type)
    else:
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type)
    return {"norm": norm, **gradients(model)}


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_norm_of_any_mix(pool, sizes, norm_type) -> None:
    wholes = {name: full(name) for name in ("split", "same", "other", "plain", "fsdp")}
    expected = torch.linalg.vector_norm(torch.stack([w.flatten() for w in wholes.values()]), norm_type)
    found = pool(sizes[0] * sizes[1])(clip_mixed, sizes, norm_type, True)
    assert torch.allclose(found.pop("norm"), expected, rtol=1e-6)
    for name, whole in wholes.items():
        clipped = found[name if name != "fsdp" else "fsdp.weight"]
        assert torch.allclose(clipped, whole / expected, rtol=1e-5), name


def test_mix_breaks_torchs_own(pool) -> None:
    with pytest.raises(AssertionError, match="DTensor"):
        pool(4)(clip_mixed, (2, 2), 2.0, False)


def clip_values(sizes: tuple[int, int]) -> tuple[dict[str, Tensor], float]:
    with on_ranks(sizes) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1))
        fabric.backward(step_loss(fabric, model))
        largest = max(float(g.abs().max()) for g in gradients(model).values())
        fabric.clip_gradients(model, optimizer, clip_val=largest / 3)
        return gradients(model), largest / 3


def test_value_clipping(pool) -> None:
    expected, limit = pool(1)(clip_values, (1, 1))
    found, _ = pool(4)(clip_values, (2, 2))
    assert max(float(g.abs().max()) for g in expected.values()) == pytest.approx(limit)
    assert all(torch.allclose(found[name], g, atol=1e-6) for name, g in expected.items())


def nonfinite(bad_rank: int, error_if_nonfinite: bool) -> float:
    with on_ranks((1, 2)) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1))
        fabric.backward(step_loss(fabric, model))
        if fabric.global_rank == bad_rank:
            model.transformer.h[1].mlp.fc_1.weight.grad.to_local()[0, 0] = float("nan")
        norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=error_if_nonfinite)
        return float(norm)  # type: ignore[arg-type]


def test_nonfinite_gradient_is_named(pool) -> None:
    with pytest.raises(AssertionError, match=r"RuntimeError: .* that of transformer\.h\.1\.mlp\.fc_1\.weight"):
        pool(2)(nonfinite, 1, True)
    norm = pool(2)(nonfinite, 1, False)
    assert norm != norm


# Checkpoints


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def save_and_load(path: Path, ours: bool, distributed: bool) -> tuple[bool, int, int]:
    """Whether the counter is still one, its count, and the epoch of the scheduler."""
    with on_ranks((1, 2), ours, save_distributed_checkpoint=distributed) as fabric:
        found = []
        for saves in (True, False):
            model = fabric.setup(build("Llama-3-8B"))
            optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters()))
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
            state = {"model": model, "optimizer": optimizer, "counter": Counter(), "scheduler": scheduler, "step": 0}
            if saves:
                fabric.backward(step_loss(fabric, model))
                optimizer.step()
                scheduler.step()
                state["counter"].count, state["step"] = 5, 7
                fabric.save(path, state)
            else:
                assert fabric.load(path, state) == {}
                found = [isinstance(state["counter"], Counter), scheduler.last_epoch, state["step"]]
        return tuple(found)  # type: ignore[return-value]


@pytest.mark.parametrize("distributed", [True, False])
def test_stateful_objects_are_restored(pool, tmp_path, distributed) -> None:
    assert pool(2)(save_and_load, tmp_path / "ours", True, distributed) == (True, 1, 7)
    if distributed:
        assert pool(2)(save_and_load, tmp_path / "fabric", False, distributed) == (False, 0, 7)


def load_with_fewer_layers(path: Path, ours: bool, distributed: bool, strict: bool) -> bool:
    with on_ranks((1, 2), ours, save_distributed_checkpoint=distributed) as fabric:
        fabric.save(path, {"model": fabric.setup(build("Llama-3-8B"))})
        smaller = build("Llama-3-8B")
        del smaller.transformer.h[1]  # type: ignore[union-attr, operator]
        fabric.load(path, {"model": fabric.setup(smaller)}, strict=strict)
        return True


@pytest.mark.parametrize("distributed", [True, False])
def test_unexpected_keys_are_reported(pool, tmp_path, distributed) -> None:
    assert pool(2)(load_with_fewer_layers, tmp_path / "1", False, distributed, True)
    assert pool(2)(load_with_fewer_layers, tmp_path / "2", True, distributed, False)
    with pytest.raises(AssertionError, match=r"keys that the model has not, such as \['transformer.h.1"):
        pool(2)(load_with_fewer_layers, tmp_path / "3", True, distributed, True)


def load_raw(path: Path) -> bool:
    with on_ranks((1, 2)) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        expected = weights(model)
        for parameter in model.parameters():
            parameter.data.zero_()
        fabric.load_raw(path, model)
        return all(torch.equal(weight, expected[name]) for name, weight in weights(model).items())


def test_plain_weights_load_into_the_parallel_model(pool, tmp_path) -> None:
    torch.save(build("Llama-3-8B").state_dict(), tmp_path / "lit_model.pth")
    assert pool(2)(load_raw, tmp_path / "lit_model.pth")


def save_twice(path: Path) -> None:
    with on_ranks((1, 2)) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        fabric.save(path, {"model": model, "step": 1})
        (path / "notes.txt").write_text("mine")
        fabric.save(path, {"model": model, "step": 2})
        state = {"model": model, "step": 0}
        fabric.load(path, state)
        assert state["step"] == 2


def test_saving_again_keeps_what_else_is_there(pool, tmp_path) -> None:
    pool(2)(save_twice, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def write_half(path: Path) -> None:
    with replacing(path, moves=True, barrier=lambda: None) as unfinished:
        unfinished.mkdir()
        (unfinished / "meta.pt").write_text("half")
        raise OSError("disk full")


def test_crash_while_saving_leaves_the_older_checkpoint(tmp_path) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "meta.pt").write_text("old")
    with pytest.raises(OSError):
        write_half(path)
    assert (path / "meta.pt").read_text() == "old"


def test_crash_between_renames_is_repaired(tmp_path) -> None:
    path = tmp_path / "checkpoint"
    (tmp_path / ".checkpoint.replaced").mkdir()
    with replacing(path, moves=True, barrier=lambda: None) as unfinished:
        assert path.is_dir()
        unfinished.mkdir()
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]


def draw_after_loading(path: Path, ours: bool) -> bool:
    """Whether the numbers drawn after loading are those drawn after saving."""
    with on_ranks((1, 2), ours) as fabric:
        fabric.seed_everything(3, verbose=False)
        model = fabric.setup(build("Llama-3-8B"))
        fabric.save(path, {"model": model})
        drawn = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        fabric.load(path, {"model": model})
        again = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        return torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]


def test_random_states_are_part_of_checkpoints(pool, tmp_path) -> None:
    assert not pool(2)(draw_after_loading, tmp_path / "fabric", False)
    assert pool(2)(draw_after_loading, tmp_path / "ours", True)


# Loss over ranks


def mean_over_targets(sizes: tuple[int, int], ours: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss of two micro-batches whose ranks ignore different numbers of targets, and its gradients."""
    with on_ranks(sizes, parallelize_fn=fabric_tp.llama()) as fabric:
        model = fabric.setup(build("llama", torch.float64))
        inputs, targets = batch(fabric, 8)
        wanted = torch.rand(8, targets.shape[1], generator=torch.Generator().manual_seed(5)) ** 4
        rank, size = fabric.strategy.device_mesh.get_local_rank("data_parallel"), sizes[0]  # type: ignore[attr-defined]
        targets = targets.masked_fill(wanted.chunk(size)[rank] < 0.3, -100)
        micro = list(zip(inputs.chunk(2), targets.chunk(2), strict=True))
        count = fabric_tp.count_targets([y for _, y in micro], fabric.strategy.device_mesh)  # type: ignore[attr-defined]
        total = torch.zeros(())
        for i, (x, y) in enumerate(micro):
            with fabric.no_backward_sync(model, enabled=i == 0):
                if ours:
                    loss = fabric_tp.cross_entropy(model(x), y, reduction="sum") / count
                else:
                    loss = fabric_tp.cross_entropy(model(x), y) / 2
                fabric.backward(loss)
            total = total + loss.detach()
        return float(fabric.all_reduce(total)), gradients(model)


def test_every_target_of_the_global_batch_weighs_the_same(pool) -> None:
    loss, expected = pool(1)(mean_over_targets, (1, 1), True)
    for sizes in [(2, 1), (2, 2)]:
        found, grads = pool(sizes[0] * sizes[1])(mean_over_targets, sizes, True)
        assert found == pytest.approx(loss, rel=1e-9)
        assert all(torch.allclose(grads[name], g, rtol=1e-6, atol=1e-9) for name, g in expected.items())
    means, _ = pool(2)(mean_over_targets, (2, 1), False)
    assert means != pytest.approx(loss, rel=1e-3)
