"""Arguments with which a model that nobody knows may run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

BATCH, LENGTH = 2, 8

ENCODED = ("encoder_hidden_states", "encoder_outputs")
"""Arguments that models with cross attention take an encoder's output by, if there is any."""


def sample_arguments(model: nn.Module, size: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Arguments that the forward may mean, by the names of those that it needs; first with an encoder's output."""
    names = needed_arguments(model)
    if not names:
        return
    first, *others = names
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    length = size * -(-LENGTH // size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, embedding.num_embeddings, (BATCH, length), generator=generator).to(device)
    encoded = torch.randn(BATCH, length + 1, embedding.embedding_dim, generator=generator).to(device, dtype)
    with device:
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        added = torch.zeros(length, length, dtype=dtype).masked_fill(~seen, -torch.inf)
        batched = [mask.expand(BATCH, 1, length, length) for mask in (added, seen)]
        masks = [*batched, torch.ones(BATCH, length, dtype=torch.int64), added, seen]
        positions = [torch.arange(length), torch.arange(length).expand(BATCH, length)]
    choices = [masks if "mask" in name else positions if "pos" in name else [] for name in others]
    taken = [{name: encoded} for name in ENCODED if name in inspect.signature(model.forward).parameters]
    for optional in (*taken, {}):
        for chosen in product(*choices):
            yield {first: tokens, **dict(zip(others, chosen, strict=True)), **optional}


def needed_arguments(model: nn.Module) -> list[str]:
    """The forward's first parameter, and those without a default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    given = [each for each in inspect.signature(model.forward).parameters.values() if each.kind in kinds]
    return [each.name for i, each in enumerate(given) if i == 0 or each.default is inspect.Parameter.empty]
