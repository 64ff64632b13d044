"""The next token of sharded logits is that of whole ones, by litgpt's rules."""

from __future__ import annotations

import pytest
import torch
from litgpt.generate.base import sample_top_p
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from fabric_tp.autograd.collectives import Group
from fabric_tp.generation.sampling import Sampling, best
from fabric_tp.testing.ranks import mesh

VOCABULARY, ROWS = 29, 3


def logits(scale: float = 2.0) -> Tensor:
    return torch.randn(ROWS, 2, VOCABULARY, generator=torch.Generator().manual_seed(0)) * scale


def litgpt_probabilities(values: Tensor, sampling: Sampling) -> Tensor:
    """As in its ``sample``."""
    if sampling.top_k is not None:
        kept, tokens = torch.topk(values, min(sampling.top_k, len(values)))
        values = torch.full_like(values, float("-inf")).scatter_(-1, tokens, kept)
    values = values / sampling.temperature
    return (sample_top_p(values, sampling.top_p) if sampling.top_p < 1 else values).softmax(-1)


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("top_k", [None, 1, 5, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
def test_probabilities_are_those_of_litgpt(temperature, top_k, top_p) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    values, tokens = best(logits()[:, 0], VOCABULARY, Group.alone(), sampling.candidates)
    of_tokens = torch.zeros(ROWS, VOCABULARY).scatter_(-1, tokens, sampling.probabilities(values))
    expected = torch.stack([litgpt_probabilities(row, sampling) for row in logits()[:, 0]])
    assert torch.allclose(of_tokens, expected, atol=1e-6)
    assert torch.equal(of_tokens > 0, expected > 0)


def choices(sampling: Sampling, size: int, scale: float) -> list[list[int]]:
    whole, index = logits(scale), torch.tensor([1, 0, 1])
    share = -(-VOCABULARY // size)
    rank = torch.distributed.get_rank()
    local = whole[..., rank * share : (rank + 1) * share]
    sharded = DTensor.from_local(
        local, mesh(1, size)["tensor_parallel"], [Shard(2)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    generators = [torch.Generator().manual_seed(number) for number in range(ROWS)]
    chosen = [sampling.choose(sharded, index, generators) for _ in range(20)]
    generators = [torch.Generator().manual_seed(number) for number in range(ROWS)]
    assert chosen == [sampling.choose(whole, index, generators) for _ in range(20)]
    return chosen


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0), Sampling(top_p=0), Sampling(top_k=5), Sampling(top_k=12, top_p=0.8), Sampling(top_p=0.8)],
    ids=str,
)
def test_sharded_logits(pool, size, sampling) -> None:
    chosen = pool(size)(choices, sampling, size, 1.0)
    assert (len({tuple(each) for each in chosen}) == 1) == (sampling.candidates == 1)


def test_equal_logits(pool) -> None:
    """The first token, as ``argmax`` takes it."""
    assert pool(2)(choices, Sampling(temperature=0), 2, 0.0)[0] == [0, 0, 0]
