"""Gradients of replicated parameters of which each rank computes a part: summed once, whatever the user does around."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fabric_tp
from fabric_tp.shards import gather_shards
from fabric_tp.styles.style import LocalModule
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.ranks import mesh
from tests.models import LENGTH, VOCABULARY, build

Sizes = tuple[int, int]
SIZES = [(1, 2), (2, 2)]


class Pair:
    """The same model parallelized and on one device, and what a user does to both."""

    def __init__(self, sizes: Sizes, name: str = "Llama-3-8B", **options: Any) -> None:
        self.sizes = sizes
        self.reference = build(name)
        self.model: Any = fabric_tp.litgpt(**options)(copy.deepcopy(self.reference), mesh(*sizes))
        self.optimizer = torch.optim.SGD(self.model.parameters())

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (2 * self.sizes[0], LENGTH)
        return torch.randint(VOCABULARY, shape, generator=generator), torch.randint(
            VOCABULARY, shape, generator=generator
        )

    def loss(self, seed: int) -> Tensor:
        """The parallelized model's, on this data-parallel rank's rows."""
        rank = mesh(*self.sizes).get_local_rank("data_parallel")
        x, y = (tensor.chunk(self.sizes[0])[rank] for tensor in self.batch(seed))
        return fabric_tp.cross_entropy(self.model(x), y)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def assert_gradients_of(self, seeds: Iterable[int]) -> None:
        """The gradients are one device's after a backward of each of these batches."""
        self.reference.zero_grad()
        for seed in seeds:
            x, y = self.batch(seed)
            F.cross_entropy(self.reference(x).flatten(0, 1), y.flatten()).backward()
        for name in partial_names(self.model):
            expected, grad = self.reference.get_parameter(name).grad, self.model.get_parameter(name).grad
            assert isinstance(grad, DTensor)
            assert not any(placement.is_partial() for placement in grad.placements), name
            assert expected is not None
            error = (gather_shards(grad) - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE, (name, error.item())


def partial_names(model: nn.Module) -> list[str]:
    names = [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, LocalModule)
        for own in sorted(module.parallelized.partial)  # gathered in this order by every rank
    ]
    assert len(names) >= 5, "the norms of two blocks and the last one"
    return names


def count_all_reduces(function: Callable[[], None]) -> int:
    """Those of the bucket: the collectives of forward and backward go another way."""
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        function()
    return all_reduce.call_count


def one_backward(sizes: Sizes, name: str) -> None:
    pair = Pair(sizes, name)
    pair.loss(0).backward()
    pair.assert_gradients_of([0])


@pytest.mark.swept(lambda p: p["sizes"] == (2, 2) and p["name"] == "pythia-14m")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["Llama-3-8B", "pythia-14m"])
def test_one_backward(pool, name, sizes) -> None:
    pool(sizes[0] * sizes[1])(one_backward, sizes, name)


def two_backwards(sizes: Sizes) -> None:
    pair = Pair(sizes)
    pair.loss(0).backward()
    pair.loss(1).backward()
    pair.assert_gradients_of([0, 1])


@pytest.mark.parametrize("sizes", SIZES)
def test_each_backward_sums_only_what_it_added(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(two_backwards, sizes)


def synchronised_or_not(sizes: Sizes, synchronise: list[bool]) -> None:
    pair = Pair(sizes)
    for seed, sync in enumerate(synchronise):
        pair.model.set_requires_gradient_sync(sync)
        pair.loss(seed).backward()
    pair.assert_gradients_of(range(len(synchronise)))


@pytest.mark.swept(lambda p: p["sizes"] == (2, 2) and p["synchronise"] != (True, False, True))
@pytest.mark.parametrize("synchronise", [(False, True), (False, False, True), (True, False, True), (False, True, True)])
@pytest.mark.parametrize("sizes", SIZES)
def test_accumulation(pool, sizes, synchronise) -> None:
    pool(sizes[0] * sizes[1])(synchronised_or_not, sizes, synchronise)


def one_bucket(sizes: Sizes) -> None:
    pair = Pair(sizes)
    pair.model.set_requires_gradient_sync(False)
    assert count_all_reduces(lambda: pair.loss(0).backward()) == 0
    pair.model.set_requires_gradient_sync(True)
    assert count_all_reduces(lambda: pair.loss(1).backward()) == 1


@pytest.mark.parametrize("sizes", SIZES)
def test_one_all_reduce_for_an_accumulated_step(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(one_bucket, sizes)


def no_bucket() -> None:
    reference = build("Llama-3-8B")
    model = fabric_tp.litgpt(sequence_parallel=False)(reference, mesh(1, 2))
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    assert count_all_reduces(lambda: fabric_tp.cross_entropy(model(tokens), tokens).backward()) == 0


def test_no_all_reduce_without_partial_gradients(pool) -> None:
    pool(2)(no_bucket)


def zero_grad_before_backward(sizes: Sizes) -> None:
    pair = Pair(sizes)
    pair.loss(0).backward()
    loss = pair.loss(1)
    pair.zero_grad()
    loss.backward()
    pair.assert_gradients_of([1])


@pytest.mark.parametrize("sizes", SIZES)
def test_zero_grad_between_forward_and_backward(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(zero_grad_before_backward, sizes)


def zero_grad_to_zeros(sizes: Sizes) -> None:
    pair = Pair(sizes)
    pair.loss(0).backward()
    pair.optimizer.zero_grad(set_to_none=False)
    pair.loss(1).backward()
    pair.assert_gradients_of([1])


@pytest.mark.parametrize("sizes", SIZES)
def test_zero_grad_that_keeps_the_tensors(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(zero_grad_to_zeros, sizes)


def one_backward_of_two_forwards(sizes: Sizes) -> None:
    pair = Pair(sizes)
    (pair.loss(0) + pair.loss(1)).backward()
    pair.assert_gradients_of([0, 1])


@pytest.mark.parametrize("sizes", SIZES)
def test_one_backward_of_two_forwards(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(one_backward_of_two_forwards, sizes)


def two_backwards_after_two_forwards(sizes: Sizes) -> None:
    pair = Pair(sizes)
    losses = [pair.loss(0), pair.loss(1)]
    for loss in losses:
        loss.backward()
    pair.assert_gradients_of([0, 1])


@pytest.mark.parametrize("sizes", SIZES)
def test_two_backwards_after_two_forwards(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(two_backwards_after_two_forwards, sizes)


def evaluation_before_backward(sizes: Sizes) -> None:
    pair = Pair(sizes)
    loss = pair.loss(0)
    with torch.no_grad():
        pair.loss(1)
    loss.backward()
    pair.assert_gradients_of([0])


@pytest.mark.parametrize("sizes", [(1, 2)])
def test_evaluation_between_forward_and_backward(pool, sizes) -> None:
    """FSDP2 itself does not allow it: its evaluation frees what the backward needs."""
    pool(sizes[0] * sizes[1])(evaluation_before_backward, sizes)


def backward_of_a_retained_graph(sizes: Sizes) -> None:
    pair = Pair(sizes)
    loss = pair.loss(0)
    loss.backward(retain_graph=True)
    loss.backward()
    pair.assert_gradients_of([0, 0])


@pytest.mark.parametrize("sizes", [(1, 2)])
def test_backward_of_a_retained_graph(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(backward_of_a_retained_graph, sizes)


class Interrupted(Exception):
    """Raised in a backward on purpose."""


def fail_in_backward(pair: Pair, seed: int) -> None:
    """In the first block, when the last one has its gradients."""

    def fail(module: nn.Module, args: Any, output: Tensor) -> None:
        def interrupt(grad: Tensor) -> None:
            raise Interrupted

        output.register_hook(interrupt)

    hook = pair.model.transformer.h[0].register_forward_hook(fail)
    loss = pair.loss(seed)
    hook.remove()
    with pytest.raises(Interrupted):
        loss.backward()


def good_backward_after_a_failed_one(sizes: Sizes, before: list[int]) -> None:
    pair = Pair(sizes)
    for seed in before:
        pair.loss(seed).backward()
    fail_in_backward(pair, 5)
    pair.zero_grad()
    pair.loss(6).backward()
    pair.assert_gradients_of([6])


@pytest.mark.parametrize("before", [[], [0]], ids=["first", "accumulated"])
def test_backward_after_a_failed_one(pool, before) -> None:
    """Without FSDP2, whose own state does not survive a failed backward."""
    pool(2)(good_backward_after_a_failed_one, (1, 2), before)


def backward_of_retained_graph_after_a_failed_one(sizes: Sizes) -> None:
    pair = Pair(sizes)
    later = pair.loss(6)
    fail_in_backward(pair, 5)
    pair.zero_grad()
    later.backward()
    pair.assert_gradients_of([6])


def test_backward_of_an_earlier_forward_after_a_failed_one(pool) -> None:
    pool(2)(backward_of_retained_graph_after_a_failed_one, (1, 2))


def training(sizes: Sizes, options: dict[str, Any]) -> None:
    """Replicas that start equal and see the same gradients stay bitwise equal."""
    pair = Pair(sizes, **options)
    optimizer = torch.optim.AdamW(pair.model.parameters(), lr=1e-2)
    for step in range(3):
        pair.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    group = mesh(*sizes).get_group("tensor_parallel")
    for name in partial_names(pair.model):
        local = pair.model.get_parameter(name)._local_tensor.detach()
        all_ranks = [torch.empty_like(local) for _ in range(sizes[1])]
        dist.all_gather(all_ranks, local, group=group)
        assert all(torch.equal(other, local) for other in all_ranks), name


@pytest.mark.parametrize("sizes", SIZES)
def test_replicas_stay_equal(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(training, sizes, {})
