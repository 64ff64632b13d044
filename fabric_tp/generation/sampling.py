"""Choosing the next token from logits that are sharded over the vocabulary, with as little on the wire as can be.

Of each prompt a rank sends its largest logit if the likeliest token is wanted, its k largest for ``top_k=k``, and all
otherwise. The order is litgpt's: top-k, temperature, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from fabric_tp import _torch
from fabric_tp.autograd.collectives import Group
from fabric_tp.loss.deferred import DeferredLogits


@dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def check(self) -> None:
        """
        Raises:
            ValueError: An option is out of its range.
        """
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0, which takes the likeliest token.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None to choose among all tokens.")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in [0, 1]; 1 chooses among all tokens.")

    @property
    def candidates(self) -> int | None:
        """Of how many of the likeliest tokens one is chosen; None for all."""
        return 1 if self.temperature == 0 or self.top_p == 0 else self.top_k

    def choose(self, logits: Tensor, index: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """The next token of each prompt, the same on each rank that has a part of the logits.

        Args:
            logits: ``(b, s, v)``, sharded over the vocabulary or not.
            index: Which of the s counts, ``(b,)``.
            generators: One for each prompt, in the same state on all ranks.
        """
        values, tokens = (each.cpu() for each in best(*rows(logits, index), self.candidates))
        if self.candidates == 1:
            return tokens[:, 0].tolist()
        drawn = [
            torch.multinomial(probabilities, 1, generator=generator)
            for probabilities, generator in zip(self.probabilities(values), generators, strict=True)
        ]
        return tokens.gather(-1, torch.stack(drawn))[:, 0].tolist()

    def probabilities(self, values: Tensor) -> Tensor:
        """Of candidates with these logits, ``(b, n)`` in descending order."""
        values = values / self.temperature
        if self.top_p < 1:
            from_here_on = values.softmax(-1).flip(-1).cumsum(-1).flip(-1)
            cut = from_here_on <= 1 - self.top_p
            cut[:, 0] = False
            values = values.masked_fill(cut, float("-inf"))
        return values.softmax(-1)


def rows(logits: Tensor, index: Tensor) -> tuple[Tensor, int, Group]:
    """This rank's logits of one position of each prompt, ``(b, v/t)``; the size v; and the ranks that share them."""
    row = torch.arange(len(index), device=index.device)
    if deferred := isinstance(logits, DeferredLogits):
        logits = logits.of_tokens(row, index).compute()
    vocabulary, group = logits.shape[-1], Group.alone()
    if isinstance(logits, DTensor):
        group, logits = Group.of(logits.device_mesh), logits.to_local()
    selected = logits if deferred else logits[row, index]
    return selected if selected.dtype == torch.float64 else selected.float(), vocabulary, group


def best(local: Tensor, vocabulary: int, group: Group, count: int | None) -> tuple[Tensor, Tensor]:
    """The largest values of each row and their tokens, both ``(b, count)``, in descending order; all if it is None."""
    share = -(-vocabulary // group.size)
    width = min(count or share, share)
    if count == 1:
        values, tokens = local.max(-1, keepdim=True)  # the first of equal ones
    else:
        values, tokens = local.topk(min(width, local.shape[-1]))
    tokens = tokens + group.rank * share
    if group.size > 1:
        missing = (0, width - values.shape[-1])  # the last rank may have fewer
        pairs = torch.stack([F.pad(values, missing, value=float("-inf")), F.pad(tokens, missing)]).double()
        gathered = _torch.all_gather(pairs, group.size, group.name).unflatten(0, (group.size, 2))
        values, tokens = gathered.permute(1, 2, 0, 3).flatten(2)
        values, tokens = values.to(local.dtype), tokens.long()
    values, order = values.sort(descending=True, stable=True)
    kept = min(count or vocabulary, vocabulary)
    return values[:, :kept], tokens.gather(-1, order)[:, :kept]
