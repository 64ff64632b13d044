"""What FSDP2 gathers, and for how long."""

from __future__ import annotations

import torch
from litgpt import GPT

import fabric_tp
from fabric_tp.measure.communication import CollectiveCounter
from fabric_tp.testing.ranks import mesh
from tests.models import VOCABULARY, litgpt_config


def gathered(layers: int) -> tuple[bool, bool, int, int]:
    """Whether embedding and head are whole between forward and backward; gathers of each."""
    both = mesh(2, 1)
    model = fabric_tp.litgpt()(GPT(litgpt_config("Llama-3-8B", n_layer=layers)), both)
    tokens = torch.randint(VOCABULARY, (2, 16))
    with CollectiveCounter(both) as forward:
        loss = fabric_tp.cross_entropy(model(tokens), tokens)
    whole = [layer.weight.device_mesh.ndim == 1 for layer in (model.transformer.wte, model.lm_head)]
    with CollectiveCounter(both) as backward:
        loss.backward()
    assert model.transformer.wte.weight.grad is not None
    gathers = [sum(each.kind == "all-gather" for each in found.collectives) for found in (forward, backward)]
    return whole[0], whole[1], gathers[0], gathers[1]


def test_an_embedding_is_whole_while_it_looks_up(pool) -> None:
    """Its backward needs no weight. The head stays whole for its backward, which is next; so does the last block."""
    assert pool(2)(gathered, 3) == (False, True, 2 + 3, 2)
