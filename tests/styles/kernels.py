"""A model whose attention draws its dropout inside, and what it drew."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_tp.testing import next_token_loss
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import small_transformers
from tests.styles.dropout_runs import parallelized, samples


def random_llama() -> nn.Module:
    return small_transformers("Llama", attention_dropout=0.5, attn_implementation="eager")


def kernel_masks(sizes: tuple[int, int], kind: str, replicate_attention: bool = False) -> list[list[Tensor]]:
    """Of each rank, in the order of calls; with activation checkpointing the backward calls again."""
    options = {"activation_checkpointing": kind, "replicate_attention": replicate_attention}
    model = parallelized(random_llama, options, sizes)
    torch.manual_seed(0)
    tokens = samples(0)[mesh(*sizes).get_local_rank("data_parallel") :: sizes[0]]
    masks: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, y: masks.append((y[1] == 0).to(torch.uint8)))
    next_token_loss(model(input_ids=tokens).logits, tokens).backward()
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, masks)
    return everyones
