"""Masks as functions of the place: their statistics, their shards, and dropout with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fabric_tp.autograd import dropout as masks
from fabric_tp.autograd.dropout import Mask, dropout, dropped
from fabric_tp.autograd.linear import linear
from fabric_tp.autograd.norms import rms_norm
from fabric_tp.seeds import mix

SHAPE = torch.Size((8, 64, 512))
RATES = [0.01, 0.1, 0.5, 0.9]
CPU = torch.device("cpu")


def mask_of(rate: float, *key: object) -> Mask:
    return Mask(rate, mix(*key))


def correlation(one: Tensor, other: Tensor, rate: float) -> float:
    """In standard deviations of what independent masks have."""
    products = (one.float() - rate) * (other.float() - rate)
    return float(products.mean()) / (rate * (1 - rate)) * math.sqrt(products.numel())


@pytest.mark.parametrize("rate", RATES)
def test_share(rate) -> None:
    drops = dropped(SHAPE, mask_of(rate, "a"), CPU).float()
    assert abs(float(drops.mean()) - rate) < 4 * math.sqrt(rate * (1 - rate) / drops.numel())


@pytest.mark.parametrize("dim", range(3))
@pytest.mark.parametrize("rate", RATES)
def test_share_along_each_dimension(rate, dim) -> None:
    """Chi-square of the means over all other dimensions: its expectation is 1."""
    drops = dropped(SHAPE, mask_of(rate, "a"), CPU).float()
    means = drops.mean(dim=[other for other in range(3) if other != dim])
    chi_square = float((means - rate).square().mean()) / (rate * (1 - rate)) * drops.numel() / SHAPE[dim]
    assert abs(chi_square - 1) < 5 * math.sqrt(2 / SHAPE[dim])


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", range(3))
@pytest.mark.parametrize("rate", RATES)
def test_neighbours_are_independent(rate, dim, lag) -> None:
    drops = dropped(SHAPE, mask_of(rate, "a"), CPU)
    length = SHAPE[dim] - lag
    assert abs(correlation(drops.narrow(dim, 0, length), drops.narrow(dim, lag, length), rate)) < 4.5


@pytest.mark.parametrize("flatten", [(0, 1), (1, 2)], ids=["rows", "samples"])
def test_all_pairs_are_independent(flatten) -> None:
    """The spread of all correlations between rows, or samples, is what chance makes of them."""
    centred = dropped(SHAPE, mask_of(0.5, "a"), CPU).float().flatten(*flatten) - 0.5
    correlations = centred @ centred.T * 4 / math.sqrt(centred.shape[1])
    pairs = correlations[torch.ones_like(correlations).triu(1).bool()]
    assert abs(float(pairs.square().mean()) - 1) < 5 * math.sqrt(2 / len(pairs))
    assert float(pairs.abs().max()) < 6


def test_correlation_is_noticed() -> None:
    drops = dropped(SHAPE, mask_of(0.1, "a"), CPU)
    leaked = drops | (torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.01)
    assert abs(correlation(drops, leaked, 0.1)) > 100


@pytest.mark.parametrize(
    "other",
    [
        mask_of(0.1, "b"),
        Mask(0.1, mix("a"), first=8),
        Mask(0.1, mix("a"), first=2**32),
        Mask(0.1, mix("a") ^ 1),
    ],
    ids=["key", "next samples", "samples far away", "key by one bit"],
)
def test_masks_are_independent(other) -> None:
    assert abs(correlation(dropped(SHAPE, mask_of(0.1, "a"), CPU), dropped(SHAPE, other, CPU), 0.1)) < 4.5


@pytest.mark.parametrize("shape", [(8,), (8, 16), (8, 16, 12), (8, 4, 12, 6)], ids=str)
def test_shards_make_the_whole(shape) -> None:
    whole = dropped(torch.Size(shape), mask_of(0.3, "a"), CPU)
    for dim in range(1, len(shape)):
        local = torch.Size(n // 2 if i == dim else n for i, n in enumerate(shape))
        parts = [dropped(local, Mask(0.3, mix("a"), shard_dim=dim, shard_rank=rank), CPU) for rank in range(2)]
        assert torch.equal(torch.cat(parts, dim), whole)
        assert not torch.equal(parts[0], parts[1])


@pytest.mark.parametrize("shape", [(8,), (8, 16), (8, 16, 12)], ids=str)
def test_samples_dealt_out_make_the_whole(shape) -> None:
    whole = dropped(torch.Size(shape), Mask(0.3, 1, first=40), CPU)
    for rank in range(2):
        local = torch.Size((4, *shape[1:]))
        assert torch.equal(dropped(local, Mask(0.3, 1, first=40 + rank, stride=2), CPU), whole[rank::2])


def test_chunks_make_no_difference(monkeypatch) -> None:
    whole = dropped(SHAPE, mask_of(0.3, "a"), CPU)
    monkeypatch.setitem(masks.CHUNK, "cpu", 1000)
    assert torch.equal(dropped(SHAPE, mask_of(0.3, "a"), CPU), whole)


def test_bits_are_those_of_splitmix64() -> None:
    """From https://prng.di.unimi.it/splitmix64.c with the state 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [bits % 2**64 for bits in masks._mix(torch.arange(5), 1234567).tolist()] == known


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_forward_and_backward_multiply_by_the_mask(rate, dtype) -> None:
    shape = torch.Size((3, 5, 7))
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    grad = torch.randn(shape, dtype=dtype)
    mask = mask_of(rate, "a")
    y = dropout(x, mask)
    y.backward(grad)
    kept = ~dropped(shape, mask, CPU) if rate < 1 else torch.zeros(shape, dtype=torch.bool)
    scale = 1 / (1 - rate) if rate < 1 else 0.0
    assert torch.equal(y, (x * scale).masked_fill(~kept, 0))
    assert x.grad is not None
    assert torch.equal(x.grad, (grad * scale).masked_fill(~kept, 0))


def test_gradients_of_gradients() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, mask_of(0.4, "a")), (x,))
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, mask_of(0.4, "a")), (x,))


@pytest.mark.parametrize("transposed", [False, True])
def test_in_place(transposed) -> None:
    leaf = torch.randn(4, 6, 6, requires_grad=True)
    x = leaf * 2
    x = x.transpose(1, 2) if transposed else x
    expected = dropout(x.detach().clone(), mask_of(0.4, "a"))
    y = dropout(x, mask_of(0.4, "a"), inplace=True)
    assert torch.equal(y, expected)
    assert y.data_ptr() == x.data_ptr()
    y.sum().backward()
    dropped_at = (y == 0).transpose(1, 2) if transposed else y == 0
    assert leaf.grad is not None
    assert torch.equal(leaf.grad == 0, dropped_at)


def test_views_in_other_orders() -> None:
    x = torch.randn(4, 6, 8)
    assert torch.equal(dropout(x.transpose(1, 2), mask_of(0.4, "a")), dropout(x.mT.contiguous(), mask_of(0.4, "a")))


def test_nothing_is_kept_for_the_backward() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dropout(torch.randn(4, 6, requires_grad=True), mask_of(0.4, "a"))
    assert not kept


def test_result_can_be_recomputed_where_the_input_can() -> None:
    x, weight = (torch.randn(rows, 6, dtype=torch.float64, requires_grad=True) for rows in (4, 5))
    norm_weight = torch.ones(6, dtype=torch.float64)

    def gradients(normed: Tensor, last: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(last(dropout(normed, mask_of(0.4, "a"))).square().sum(), (x, weight))

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = gradients(rms_norm(x, norm_weight, 1e-5), lambda y: linear(y, [weight]))
    expected = gradients(F.rms_norm(x, (6,), norm_weight, 1e-5), lambda y: F.linear(y, weight))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # norms compute in fp32
    dropped_values = dropout(F.rms_norm(x, (6,), norm_weight, 1e-5), mask_of(0.4, "a"))
    assert not any(each.shape == x.shape and torch.allclose(each, dropped_values) for each in kept)


def test_empty() -> None:
    assert dropout(torch.empty(0, 4), mask_of(0.4, "a")).shape == (0, 4)
