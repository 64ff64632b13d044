"""Sizes, setting up, precision: the strategy beside Fabric's own."""

from __future__ import annotations

import os
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fabric_tp
from tests.fabric import batch, on_ranks
from tests.models import build
from tests.strategy.training import step_loss, weights

BOTH = pytest.mark.parametrize("ours", [False, True], ids=["Fabric's", "ours"])


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
