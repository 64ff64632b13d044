"""Are the tokens that a parallelized model generates those of one device?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_tp.architectures.cache import NoCache
from fabric_tp.generation import generate
from fabric_tp.parallelize import Parallelize
from fabric_tp.testing.parity import BuildModel
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import VOCABULARY

OwnGenerate = Callable[[nn.Module, list[Tensor], int], list[Tensor]]
"""From a model, prompts and a number of new tokens to what the model's library continues them with."""
LENGTHS = (4, 1, 3)
"""Of a batch of prompts: none is longer than the sliding windows of small models."""
LONG = 11
"""Of one that is."""
NEW = 8


@dataclass(frozen=True)
class Generated:
    """Prompts with the likeliest continuations: a batch of several, and a long one by itself."""

    parallel: list[list[int]]
    whole: list[list[int]]
    """Of one device, computing the whole sequence again for each token."""
    own: list[list[int]]
    """Of one device, by the model's library; fewer where that cannot do it."""
    error: str = ""
    """Of the library."""

    @property
    def equals_own(self) -> bool:
        return bool(self.own) and self.parallel[: len(self.own)] == self.own

    @property
    def equals_whole(self) -> bool:
        return self.parallel == self.whole


def prompts(lengths: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def compare_generated(
    build_model: BuildModel, parallelize_fn: Parallelize, own_generate: OwnGenerate, sizes: tuple[int, int]
) -> Generated | None:
    """On each rank of a mesh of these sizes; rank 0 returns it."""
    *several, long = prompts((*LENGTHS, LONG))
    model = parallelize_fn(build_model(), mesh(*sizes))
    batches = [several, [long]]
    try:
        parallel = _continued(model, batches)
    except ValueError:  # a model that takes no mask
        batches = [[prompt] for prompt in (*several, long)]
        parallel = _continued(model, batches)
    if dist.get_rank():
        return None
    alone, own, error = build_model().eval(), list[Tensor](), ""
    whole = [_without_cache(alone, prompt) for prompt in (*several, long)]
    try:
        for batch in batches:
            own += own_generate(alone, batch, NEW)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}".splitlines()[0]
    return Generated(_lists(parallel), _lists(whole), _lists(own), error)


def _continued(model: nn.Module, batches: list[list[Tensor]]) -> list[Tensor]:
    return [tokens for batch in batches for tokens in generate(model, batch, NEW, temperature=0)]


def _lists(continued: list[Tensor]) -> list[list[int]]:
    return [tokens.tolist() for tokens in continued]


@torch.no_grad()
def _without_cache(model: nn.Module, prompt: Tensor) -> Tensor:
    cache = NoCache(model, model, [prompt], NEW)
    logits, index = cache.prefill()
    for _ in range(NEW):
        prompt = torch.cat([prompt, token := logits[0, index].argmax(-1)])
        logits, index = cache.step(token)
    return prompt
