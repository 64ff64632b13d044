"""Any optimizer on local shards: the results of one device, what users see, and what it allocates."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.fabric.wrappers import _FabricOptimizer
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fabric_tp
from fabric_tp._torch import FakeTensorMode
from fabric_tp.shards import copy_shard, gather_shards
from fabric_tp.strategy.optimizer import ELEMENTWISE, PIECE, local
from fabric_tp.testing.ranks import mesh
from tests.measure.test_communication import NoDTensorOperations
from tests.models import build

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


def sharded_model(sizes: tuple[int, int]) -> nn.Module:
    model = fabric_tp.litgpt()(build("Llama-3-8B"), mesh(*sizes))
    next(model.parameters()).requires_grad_(False)
    return model


def plain_copies(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(gather_shards(p).clone(), requires_grad=p.requires_grad) for p in parameters]


def groups(parameters: list[nn.Parameter], decay: bool = True) -> list[dict[str, Any]]:
    matrices = {"params": [p for p in parameters if p.ndim > 1]}
    return [matrices | ({"weight_decay": 0.1} if decay else {}), {"params": [p for p in parameters if p.ndim < 2]}]


def set_gradients(parameters: list[nn.Parameter], step: int, every: bool = False) -> None:
    """The same, whatever the mesh. Unless ``every``: none for the second parameter, and for the third not at first."""
    generator = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(parameters):
        whole = torch.randn(parameter.shape, generator=generator)
        absent = not every and (index == 1 or (index == 2 and step == 0))
        without = absent or not parameter.requires_grad
        parameter.grad = None if without else torch.zeros_like(parameter.detach())
        if parameter.grad is not None:
            copy_shard(parameter.grad, whole)


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_dtensor_operation_nor_communication(pool, name) -> None:
    pool(4)(step_without_dtensor_operations, name, True)


def test_a_dtensor_operation_would_be_noticed(pool) -> None:
    with pytest.raises(AssertionError, match="ran on a DTensor"):
        pool(4)(step_without_dtensor_operations, "AdamW", False)


def parameters_with_gradients() -> list[nn.Parameter]:
    tensor_parallel = mesh(1, 2)["tensor_parallel"]
    made = []
    for seed in range(3):
        values = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(seed))
        parameter = nn.Parameter(distribute_tensor(values[0], tensor_parallel, [Shard(0)]))
        parameter.grad = distribute_tensor(values[1], tensor_parallel, [Shard(0)])
        made.append(parameter)
    return made


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


def hooks_see_dtensors() -> None:
    parameters = parameters_with_gradients()
    optimizer = optim.AdamW(parameters, lr=1e-2)
    seen: list[tuple[str, bool, bool]] = []

    def hook(when: str) -> Callable[..., None]:
        def see(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            same = all(p is q for p, q in zip(optimizer.param_groups[0]["params"], parameters, strict=True))
            momenta = [state["exp_avg"] for state in optimizer.state.values()]
            seen.append((when, same, all(isinstance(momentum, DTensor) for momentum in momenta)))

        return see

    optimizer.register_step_pre_hook(hook("before"))
    optimizer.register_step_post_hook(hook("after"))
    with local(optimizer):
        optimizer.register_step_pre_hook(hook("before, registered late"))
        optimizer.register_step_post_hook(hook("after, registered late"))
        optimizer.step()
    whens = ["before", "after", "after, registered late"]
    assert [each for each in seen if each[0] in whens] == [(when, True, True) for when in whens]


def test_hooks_see_dtensors(pool) -> None:
    pool(2)(hooks_see_dtensors)


def nothing_is_left_behind() -> None:
    parameters = parameters_with_gradients()
    optimizer = optim.AdamW(parameters, lr=1e-2)
    list_, group, state = optimizer.param_groups, optimizer.param_groups[0], optimizer.state
    options = {key: value for key, value in group.items() if key != "params"}
    gradients = [p.grad for p in parameters]
    with local(optimizer):
        optimizer.step()
    assert optimizer.param_groups is list_
    assert list_[0] is group
    assert optimizer.state is state
    assert {key: value for key, value in group.items() if key != "params"} == options
    assert all(p.grad is gradient for p, gradient in zip(parameters, gradients, strict=True))
    assert set(state) == set(parameters)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_nothing_is_left_behind(pool) -> None:
    pool(2)(nothing_is_left_behind)


def state_stays_the_same_object() -> None:
    optimizer = optim.AdamW(parameters_with_gradients(), lr=1e-2)
    with local(optimizer):
        optimizer.step()
        before = [id(value) for state in optimizer.state.values() for value in state.values()]
        optimizer.step()
    assert [id(value) for state in optimizer.state.values() for value in state.values()] == before


def test_state_stays_the_same_object(pool) -> None:
    pool(2)(state_stays_the_same_object)


def autograd_notices_the_update() -> None:
    parameter = parameters_with_gradients()[0]
    optimizer = optim.AdamW([parameter], lr=1e-2)
    before = parameter._version
    with local(optimizer):
        optimizer.step()
    assert parameter._version > before


def test_autograd_notices_the_update(pool) -> None:
    pool(2)(autograd_notices_the_update)


class Interrupted(Exception):
    pass


def interrupted_closure() -> float:
    raise Interrupted


def a_step_that_raises(in_closure: bool) -> None:
    parameters = parameters_with_gradients()
    optimizer = optim.AdamW(parameters, lr=1e-2)
    broken = mock.patch("torch.optim.adam.adam", side_effect=Interrupted)
    with pytest.raises(Interrupted), broken, local(optimizer):
        optimizer.step(interrupted_closure if in_closure else None)
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], parameters, strict=True))
    assert all(isinstance(state["exp_avg"], DTensor) for state in optimizer.state.values())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("in_closure", [True, False], ids=["closure", "step"])
def test_all_is_put_back_after_an_exception(pool, in_closure) -> None:
    pool(2)(a_step_that_raises, in_closure)


def closures(positional: bool) -> None:
    with_closure, without = parameters_with_gradients(), parameters_with_gradients()
    gradients = [p.grad for p in with_closure]
    optimizer = optim.AdamW(with_closure, lr=1e-2)
    optimizer.zero_grad()

    def closure() -> float:
        assert all(isinstance(p, DTensor) for p in optimizer.param_groups[0]["params"])
        for parameter, gradient in zip(with_closure, gradients, strict=True):
            parameter.grad = gradient
        return 3.0

    reference = optim.AdamW(without, lr=1e-2)
    for _ in range(2):
        with local(optimizer):
            assert (optimizer.step(closure) if positional else optimizer.step(closure=closure)) == 3.0
        with local(reference):
            reference.step()
    for parameter, expected in zip(with_closure, without, strict=True):
        assert torch.equal(parameter.to_local(), expected.to_local())  # type: ignore[attr-defined]


@pytest.mark.parametrize("positional", [True, False])
def test_a_closure_computes_on_dtensors(pool, positional) -> None:
    pool(2)(closures, positional)


def schedulers() -> None:
    parameters = parameters_with_gradients()
    optimizer = optim.SGD(parameters, lr=1.0)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)
    start = [p.detach().to_local().clone() for p in parameters]  # type: ignore[attr-defined]
    for _ in range(2):
        with local(optimizer):
            optimizer.step()
        scheduler.step()
    for parameter, first in zip(parameters, start, strict=True):
        torch.testing.assert_close(parameter.detach().to_local(), first - 1.1 * parameter.grad.to_local())  # type: ignore[attr-defined, union-attr]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_schedulers_set_the_learning_rate(pool) -> None:
    pool(2)(schedulers)


def state_dict_round_trip() -> None:
    one, other = parameters_with_gradients(), parameters_with_gradients()
    first, second = optim.AdamW(one, lr=1e-2), optim.AdamW(other, lr=1e-2)
    with local(first):
        first.step()
    second.load_state_dict(deepcopy(first.state_dict()))  # which torch does not copy
    for parameter, copy in zip(one, other, strict=True):
        copy.data.to_local().copy_(parameter.data.to_local())  # type: ignore[attr-defined]
    for optimizer in (first, second):
        with local(optimizer):
            optimizer.step()
    for parameter, copy in zip(one, other, strict=True):
        assert torch.equal(parameter.to_local(), copy.to_local())  # type: ignore[attr-defined]
    with local(second):
        second.step()
    second.step()  # and on DTensors again


def test_state_dict(pool) -> None:
    pool(2)(state_dict_round_trip)


def train_and_save(sizes: tuple[int, int], path: Path) -> None:
    model = sharded_model(sizes)
    parameters = list(model.parameters())
    optimizer = optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2)
    for step in range(3):
        set_gradients(parameters, step, every=True)
        with local(optimizer):
            optimizer.step()
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=path)


def load_and_train(sizes: tuple[int, int], path: Path) -> list[float]:
    """Sums over the weights after another step."""
    model = sharded_model(sizes)
    parameters = list(model.parameters())
    optimizer = optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    set_gradients(parameters, 3, every=True)
    with local(optimizer):
        optimizer.step()
    return [float(gather_shards(p).double().abs().sum()) for p in parameters]


def test_a_checkpoint_moves_to_other_meshes(pool, tmp_path) -> None:
    pool(4)(train_and_save, (2, 2), tmp_path)
    expected = pool(4)(load_and_train, (2, 2), tmp_path)
    for sizes in [(1, 2), (2, 1)]:
        assert pool(2)(load_and_train, sizes, tmp_path) == pytest.approx(expected, rel=1e-9)


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


def test_a_step_without_values() -> None:
    """In which memory is counted; the default's loop would ask for values."""
    with FakeTensorMode():
        parameter = nn.Parameter(torch.randn(4, 4))
        parameter.grad = torch.randn(4, 4)
        optimizer = optim.AdamW([parameter])
        for _ in range(2):
            with local(optimizer):
                optimizer.step()
    assert optimizer.state[parameter]["exp_avg"].shape == (4, 4)


class Temporaries(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make: ``peak`` of those alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        out = operation(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in given | self._known:
                self._known.add(id(storage))
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def temporaries(kind: type[Optimizer], options: dict[str, Any], piece: int | None) -> tuple[int, int, int]:
    """Peak in the second step, bytes of the largest parameter, and of all. Without ``piece``, not on local shards."""
    plain = [nn.Parameter(torch.randn(64, 64)) for _ in range(10)]
    optimizer = kind(plain, lr=1e-2, **options)  # type: ignore[call-arg]
    peak = 0
    for _ in range(2):
        for parameter in plain:
            parameter.grad = torch.randn(64, 64)
        with Temporaries() as tracker:
            if piece is None:
                optimizer.step()
            else:
                with mock.patch("fabric_tp.strategy.optimizer.PIECE", piece), local(optimizer):
                    optimizer.step()
        peak = tracker.peak
    return peak, plain[0].nbytes, sum(p.nbytes for p in plain)


SCALAR_BYTES = 1024


@pytest.mark.parametrize("kind", [optim.AdamW, optim.Adam, optim.SGD])
def test_fused_updates_have_no_temporaries(kind) -> None:
    peak, _, _ = temporaries(kind, {"weight_decay": 0.1}, PIECE)
    assert peak < SCALAR_BYTES


@pytest.mark.parametrize("piece", [1, 2 * 64 * 64 * 4])
def test_foreach_has_temporaries_of_a_piece(piece) -> None:
    peak, largest, _ = temporaries(optim.AdamW, {"foreach": True}, piece)
    assert peak <= max(piece, largest) + SCALAR_BYTES


def test_foreach_of_torch_has_temporaries_of_all_parameters() -> None:
    peak, _, everything = temporaries(optim.AdamW, {"foreach": True}, None)
    assert peak >= everything


@pytest.mark.parametrize("kind", [kind for kind in ELEMENTWISE if kind not in (optim.AdamW, optim.Adam, optim.SGD)])
def test_others_have_temporaries_of_three_parameters(kind) -> None:
    peak, largest, _ = temporaries(kind, {}, 1)
    assert peak <= 3 * largest + SCALAR_BYTES
