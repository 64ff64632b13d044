"""Text from a parallelized model."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_tp import _torch
from fabric_tp.autograd.collectives import Group
from fabric_tp.loss.deferred import DeferredLogits


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    eos_id: int | None = None,
) -> Tensor:
    """Continue ``tokens``, the same on every rank; all ranks must call it.

    The whole sequence is computed for each new token, so this is for samples and not for serving. All have one length,
    since a causal model does not see what comes later.

    Args:
        model: Maps tokens ``(1, s)`` to logits ``(1, s, v)``, sharded over the vocabulary or not.
        tokens: The prompt, ``(n,)``, the same on every rank.
        max_new_tokens: How many tokens to add at most.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Choose among so many of the likeliest tokens only.
        seed: Of the choice; None takes the state of torch's generator of the first rank.
        eos_id: Stop after this token.

    Returns:
        Prompt and continuation, ``(n + new,)``.

    Raises:
        ValueError: The prompt is not a tensor ``(n,)`` of at least one token.

    Example::

        tokens = fabric_tp.generate(model, tokenizer.encode("def ", device=fabric.device), 64, temperature=0.8)
    """
    padded = _padded(tokens, max_new_tokens)
    generator = torch.Generator().manual_seed(seed if seed is not None else _common_seed(tokens.device))
    length, training = len(tokens), model.training
    model.eval()
    try:
        for position in range(length, length + max_new_tokens):
            last = _row(model(padded), position - 1)
            token = _choose(last.float().cpu(), generator, temperature, top_k)
            padded[0, position] = token
            length += 1
            if token == eos_id:
                break
    finally:
        model.train(training)
    return padded[0, :length]


def _padded(tokens: Tensor, max_new_tokens: int) -> Tensor:
    """The prompt as a batch of one, with room for what is added."""
    if tokens.dim() != 1 or not len(tokens):
        raise ValueError(
            f"The prompt must be a tensor of shape (n,) with n > 0, and has the shape {tuple(tokens.shape)}."
        )
    padded = tokens.new_zeros(1, len(tokens) + max_new_tokens)
    padded[0, : len(tokens)] = tokens
    return padded


def _row(logits: Tensor, position: int) -> Tensor:
    """The whole logits ``(v,)`` of one position."""
    if isinstance(logits, DeferredLogits):
        selected = logits[:, position : position + 1]
        assert isinstance(selected, DeferredLogits)
        return _row(selected.compute(), 0)
    if not isinstance(logits, DTensor):
        return logits[0, position]
    group, row, vocabulary = Group.of(logits.device_mesh), logits.to_local()[0, position], logits.shape[-1]
    row = F.pad(row, (0, -(-vocabulary // group.size) - len(row)))
    return _torch.all_gather(row.contiguous(), group.size, group.name)[:vocabulary]


def _choose(logits: Tensor, generator: torch.Generator, temperature: float, top_k: int | None) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, indices = logits.topk(min(top_k or len(logits), len(logits)))
    chosen = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
    return int(indices[chosen])


def _common_seed(device: torch.device) -> int:
    seed = torch.randint(2**62, (1,), device="cpu").to(device)
    if dist.is_initialized():
        dist.broadcast(seed, 0)
    return int(seed)
