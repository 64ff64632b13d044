"""Optimizers on local shards compute what they compute on whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.fabric.wrappers import _FabricOptimizer
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fabric_tp.shards import gather_shards
from fabric_tp.strategy.optimizer import ELEMENTWISE, local
from fabric_tp.testing.ranks import mesh
from tests.measure.test_communication import NoDTensorOperations
from tests.strategy.optimizers import parameters_with_gradients, set_gradients, sharded_model

MESHES = [(1, 2), (2, 1), (2, 2)]


STEPS = 5


OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "AdamW": (optim.AdamW, {}),
    "AdamW foreach": (optim.AdamW, {"foreach": True}),
    "AdamW fused": (optim.AdamW, {"fused": True}),
    "AdamW loop": (optim.AdamW, {"foreach": False}),
    "AdamW amsgrad maximize": (optim.AdamW, {"amsgrad": True, "maximize": True}),
    "Adam": (optim.Adam, {}),
    "SGD": (optim.SGD, {}),
    "SGD momentum": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD foreach": (optim.SGD, {"momentum": 0.9, "foreach": True}),
    "RMSprop": (optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adagrad": (optim.Adagrad, {}),
    "Adadelta": (optim.Adadelta, {}),
    "Adamax": (optim.Adamax, {}),
    "NAdam": (optim.NAdam, {}),
    "RAdam": (optim.RAdam, {}),
    "ASGD": (optim.ASGD, {}),
    "Rprop": (optim.Rprop, {}),
}


AUTOMATICALLY_FUSED = ("AdamW", "AdamW amsgrad maximize", "Adam", "SGD", "SGD momentum")


def plain_copies(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(gather_shards(p).clone(), requires_grad=p.requires_grad) for p in parameters]


def groups(parameters: list[nn.Parameter], decay: bool = True) -> list[dict[str, Any]]:
    matrices = {"params": [p for p in parameters if p.ndim > 1]}
    return [matrices | ({"weight_decay": 0.1} if decay else {}), {"params": [p for p in parameters if p.ndim < 2]}]


def assert_close(parameters: list[nn.Parameter], expected: list[nn.Parameter], tolerance: float) -> None:
    for parameter, plain in zip(parameters, expected, strict=True):
        whole = gather_shards(parameter)
        torch.testing.assert_close(whole, plain.detach(), rtol=0, atol=tolerance * float(plain.detach().abs().max()))


def train(name: str, sizes: tuple[int, int], after_step: Callable[[Optimizer], None] | None = None) -> None:
    kind, options = OPTIMIZERS[name]
    parameters = list(sharded_model(sizes).parameters())
    expected = plain_copies(parameters)
    decay = kind is not optim.Rprop
    optimizer = kind(groups(parameters, decay), lr=1e-2, **options)  # type: ignore[call-arg]
    reference = kind(groups(expected, decay), lr=1e-2, **options)  # type: ignore[call-arg]
    for step in range(STEPS):
        set_gradients(parameters, step)
        set_gradients(expected, step)
        with local(optimizer):
            optimizer.step()
        reference.step()
        if after_step:
            after_step(optimizer)
    assert_close(parameters, expected, 1e-6 if name in AUTOMATICALLY_FUSED else 0.0)


@pytest.mark.swept(lambda p: p["sizes"] != (1, 2) and p["name"] not in ("AdamW", "AdamW fused"))
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_those_of_one_device(pool, name, sizes) -> None:
    pool(sizes[0] * sizes[1])(train, name, sizes)


def decay_too_much(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] *= 1.01


def test_a_small_mistake_would_be_noticed(pool) -> None:
    with pytest.raises(AssertionError, match="not close"):
        pool(2)(train, "AdamW", (1, 2), decay_too_much)


def unlike_parameters() -> list[nn.Parameter]:
    """Plain, replicated, of other meshes and dtypes, without dimensions, uneven, empty on one rank, transposed."""
    wide, tensor_parallel = mesh(1, 2), mesh(1, 2)["tensor_parallel"]
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        nn.Parameter(tensor(3, 5)),
        nn.Parameter(distribute_tensor(tensor(6, 5), tensor_parallel, [Shard(0)])),
        nn.Parameter(distribute_tensor(tensor(5, 7), tensor_parallel, [Shard(1)])),
        nn.Parameter(distribute_tensor(tensor(1, 4), tensor_parallel, [Shard(0)])),
        nn.Parameter(distribute_tensor(tensor(4, 4), wide, [Replicate(), Shard(0)])),
        nn.Parameter(distribute_tensor(tensor(4), wide, [Replicate(), Replicate()])),
        nn.Parameter(distribute_tensor(tensor(), tensor_parallel, [Replicate()])),
        nn.Parameter(distribute_tensor(tensor(8, 3).double(), tensor_parallel, [Shard(0)])),
        nn.Parameter(DTensor.from_local(tensor(3, 6).t(), tensor_parallel, [Replicate()])),
    ]


def train_unlike(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    parameters = unlike_parameters()
    expected = [
        nn.Parameter(p.full_tensor().detach().clone() if isinstance(p, DTensor) else p.detach().clone())
        for p in parameters
    ]
    optimizer = kind(parameters, lr=1e-2, **options)  # type: ignore[call-arg]
    reference = kind(expected, lr=1e-2, **options)  # type: ignore[call-arg]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for parameter, plain in zip(parameters, expected, strict=True):
            plain.grad = torch.randn(plain.shape, generator=generator).to(plain.dtype)
            like_parameter = isinstance(parameter, DTensor)
            parameter.grad = (
                distribute_tensor(plain.grad, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
                if like_parameter
                else plain.grad.clone()
            )
        with local(optimizer):
            optimizer.step()
        reference.step()
    for parameter, plain in zip(parameters, expected, strict=True):
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        torch.testing.assert_close(whole, plain, rtol=1e-6, atol=1e-6)
        for key, value in optimizer.state[parameter].items():
            like_parameter = isinstance(parameter, DTensor) and key != "step"
            assert isinstance(value, DTensor) == like_parameter, key
            if like_parameter:
                assert (value.shape, value.placements) == (parameter.shape, parameter.placements)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["AdamW", "AdamW foreach", "SGD momentum", "RMSprop"])
def test_unlike_parameters_share_a_group(pool, name) -> None:
    pool(2)(train_unlike, name)


def partial_gradient() -> None:
    tensor_parallel = mesh(1, 2)["tensor_parallel"]
    parameter = nn.Parameter(distribute_tensor(torch.zeros(4), tensor_parallel, [Replicate()]))
    parameter.grad = DTensor.from_local(torch.ones(4), tensor_parallel, [Partial()])
    optimizer = optim.SGD([parameter], lr=1.0)
    with local(optimizer):
        optimizer.step()
    assert parameter.to_local().tolist() == [-2.0] * 4


def test_a_partial_gradient_is_summed(pool) -> None:
    pool(2)(partial_gradient)


def step_without_dtensor_operations(name: str, use_local: bool) -> None:
    kind, options = OPTIMIZERS[name]
    parameters = list(sharded_model((2, 2)).parameters())
    optimizer = kind(groups(parameters, False), lr=1e-2, **options)  # type: ignore[call-arg]
    for step in range(2):  # the first makes the state
        set_gradients(parameters, step)
        with CommDebugMode() as communication, NoDTensorOperations():
            if use_local:
                with local(optimizer):
                    optimizer.step()
            else:
                optimizer.step()
        assert communication.get_total_counts() == 0


@pytest.mark.swept(lambda p: not p["name"].startswith("AdamW"))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_dtensor_operation_nor_communication(pool, name) -> None:
    pool(4)(step_without_dtensor_operations, name, True)


def test_a_dtensor_operation_would_be_noticed(pool) -> None:
    with pytest.raises(AssertionError, match="ran on a DTensor"):
        pool(4)(step_without_dtensor_operations, "AdamW", False)


class SubclassOfSGD(optim.SGD):
    """An optimizer that might need whole tensors."""


def is_left_alone(kind: type[Optimizer], options: dict[str, Any]) -> None:
    with_local, without = parameters_with_gradients(), parameters_with_gradients()
    optimizer = kind(with_local, lr=1e-2, **options)  # type: ignore[call-arg]
    with local(optimizer), DTensorOperations() as operations:
        optimizer.step()
    kind(without, lr=1e-2, **options).step()  # type: ignore[call-arg]
    assert operations.count > 0
    for parameter, expected in zip(with_local, without, strict=True):
        assert torch.equal(parameter.to_local(), expected.to_local())  # type: ignore[attr-defined]


class DTensorOperations(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(isinstance(leaf, DTensor) for leaf in tree_leaves((args, kwargs)))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "options"), [(optim.Muon, {}), (SubclassOfSGD, {"momentum": 0.9})], ids=["Muon", "subclass"]
)
def test_what_may_need_whole_tensors_is_left_alone(pool, kind, options) -> None:
    pool(2)(is_left_alone, kind, options)


def differentiable_is_left_alone() -> None:
    optimizer = optim.SGD([p.requires_grad_(False) for p in parameters_with_gradients()], differentiable=True)
    with local(optimizer), DTensorOperations() as operations:
        optimizer.step()
    assert operations.count > 0


def test_a_differentiable_optimizer_is_left_alone(pool) -> None:
    pool(2)(differentiable_is_left_alone)


def test_elementwise_optimizers_are_all_of_torch_but_the_known_exceptions() -> None:
    """A new optimizer of torch needs a decision."""
    every = {kind for kind in vars(optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    assert every - set(ELEMENTWISE) == {Optimizer, optim.Adafactor, optim.LBFGS, optim.Muon, optim.SparseAdam}


def lightning_optimizer() -> None:
    optimizer = optim.AdamW(parameters_with_gradients(), lr=1e-2)
    strategy = SingleDeviceStrategy()
    with NoDTensorOperations(), local(wrapped := _FabricOptimizer(optimizer, strategy)):  # type: ignore[arg-type]
        wrapped.step()


def test_the_optimizer_may_be_one_of_fabric(pool) -> None:
    pool(2)(lightning_optimizer)


@pytest.mark.parametrize(
    ("kind", "options"), [(optim.AdamW, {}), (optim.SGD, {"momentum": 0.9})], ids=["AdamW", "SGD momentum"]
)
def test_bf16_is_as_near_to_the_exact_result_as_by_default(kind, options) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=generator).bfloat16()
    gradients = [torch.randn(1000, generator=generator).bfloat16() for _ in range(STEPS)]

    def train_in(dtype: torch.dtype, use_local: bool) -> Tensor:
        parameter = nn.Parameter(start.to(dtype, copy=True))
        optimizer = kind([parameter], lr=1e-2, **options)
        for gradient in gradients:
            parameter.grad = gradient.to(dtype)
            with local(optimizer) if use_local else nullcontext():
                optimizer.step()
        return parameter.detach().double()

    exact = train_in(torch.float64, False)
    default = (train_in(torch.bfloat16, False) - exact).abs().mean()
    assert (train_in(torch.bfloat16, True) - exact).abs().mean() <= 1.1 * default
