"""What the ranks are asked for: checked, and compared before they begin."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Stop = Sequence[int | Sequence[int]]
"""Tokens, or sequences of tokens, each of which ends a continuation."""


def check_prompts(tokens: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """
    Raises:
        ValueError: There is no prompt, or one is no tensor ``(n,)`` of at least one token.
    """
    prompts = [tokens] if isinstance(tokens, Tensor) else list(tokens)
    if not prompts:
        raise ValueError("There is no prompt: tokens is an empty list. It must hold tensors of shape (n,).")
    for prompt in prompts:
        if not isinstance(prompt, Tensor) or prompt.dim() != 1 or not len(prompt):
            given = f"has the shape {tuple(prompt.shape)}" if isinstance(prompt, Tensor) else f"is {prompt!r}"
            raise ValueError(
                f"A prompt must be a tensor of shape (n,) with n > 0, and this one {given}. Several prompts are a list"
                " of such tensors, of any lengths."
            )
    return prompts


def stop_sequences(stop: Stop, eos_id: int | None) -> list[list[int]]:
    """
    Raises:
        ValueError: One is empty.
    """
    sequences = [[each] if isinstance(each, int) else list(each) for each in stop]
    if [] in sequences:
        raise ValueError(f"stop={stop!r} holds an empty sequence, which would stop before anything is generated.")
    return sequences + ([[eos_id]] if eos_id is not None else [])


def common_seed(prompts: Sequence[Tensor], asked: Sequence[object], seed: int | None) -> int:
    """The seed of all ranks, which is that of the first where none is given.

    Raises:
        ValueError: On all ranks: they were given other prompts or options. They would wait for each other forever.
    """
    drawn = seed if seed is not None else int(torch.randint(2**62, (1,), device="cpu"))
    if not dist.is_initialized():
        return drawn
    said = repr(([prompt.tolist() for prompt in prompts], *asked, seed)).encode()
    digest = int.from_bytes(hashlib.sha256(said).digest()[:7], "big")
    mine = torch.tensor([digest, drawn], device=prompts[0].device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    if wrong := [rank for rank, other in enumerate(every) if other[0] != every[0][0]]:
        raise ValueError(
            f"Ranks {wrong} were given other prompts or options than rank 0. All ranks must generate the same: give"
            " each the same prompts, in batches of the same size and order."
        )
    return int(every[0][1])
