"""Each of these drops, on purpose, one sum over ranks that a model needs: the comparison must notice, by far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from torch import nn
from torch.distributed.tensor import Replicate

import fabric_tp
from fabric_tp.parallelize.partial_gradients import PartialGradients
from fabric_tp.styles import AllHeadsNorm
from fabric_tp.styles.style import LocalModule
from fabric_tp.testing.parity import TOLERANCE
from fabric_tp.testing.small import small_causal, small_config, small_gpt, small_lora
from tests.parity import differences_of


def drop_gradient_sum(*layers: str, model: nn.Module) -> None:
    """Take each rank's part for the whole gradient, of the parameters in these layers."""
    dropped = 0
    for path, module in model.named_modules():
        if isinstance(module, LocalModule):
            for name in module.parallelized.partial:
                if any(layer in f".{path}.{name}." for layer in layers):
                    module.parallelized.grad_placements[name] = [Replicate()]
                    dropped += 1
    assert dropped
    for hook in model._forward_hooks.values():
        sums: Any = getattr(hook, "__self__", None)
        if isinstance(sums, PartialGradients):
            paths = {module: path for path, module in model.named_modules()}
            sums._owners = [
                (module, name)
                for module, name in sums._owners
                if not any(layer in f".{paths[module]}.{name}." for layer in layers)
            ]


def drop_mean_across_ranks(*layers: str, model: nn.Module) -> None:
    """In these norms, or in all."""
    norms = [
        module
        for path, module in model.named_modules()
        if isinstance(module, LocalModule) and isinstance(module.parallelized.style, AllHeadsNorm)
        if not layers or path.rpartition(".")[2] in layers
    ]
    assert norms
    for norm in norms:
        norm.parallelized.group = replace(norm.parallelized.group, size=1)


def gpt(name: str, **overrides: int) -> Callable[[], nn.Module]:
    return partial(small_gpt, small_config(name, **overrides))


MUTATIONS = {
    "shared keys": (gpt("Gemma-2b"), partial(drop_gradient_sum, ".k.")),
    "shared values": (gpt("Gemma-2b"), partial(drop_gradient_sum, ".v.")),
    "query norm": (gpt("Qwen3-0.6B"), partial(drop_gradient_sum, ".norm_q.")),
    "key norm": (gpt("Qwen3-0.6B"), partial(drop_gradient_sum, ".norm_k.")),
    "router": (gpt("Mixtral-8x7B-v0.1", n_head=8, n_query_groups=4), partial(drop_gradient_sum, ".mlp.gate.")),
    "mean of OLMo 2": (gpt("OLMo-2-1124-7B", n_head=8, n_query_groups=8), drop_mean_across_ranks),
    "mean of what the heads give": (partial(small_causal, "bitnet"), partial(drop_mean_across_ranks, "attn_sub_norm")),
    "mean of hidden features": (partial(small_causal, "bitnet"), partial(drop_mean_across_ranks, "ffn_sub_norm")),
    "low-rank A": (partial(small_lora, "Llama-3-8B", "every layer"), partial(drop_gradient_sum, ".fc_1.lora_A.")),
    "low-rank B": (partial(small_lora, "Llama-3-8B", "every layer"), partial(drop_gradient_sum, ".proj.lora_B.")),
}


@pytest.mark.swept(lambda p: p["sequence_parallel"] == (list(MUTATIONS).index(p["mutation"]) % 2 == 0))
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_notices(pool, mutation, sequence_parallel) -> None:
    build, break_model = MUTATIONS[mutation]
    parallelize_fn = fabric_tp.auto(sequence_parallel=sequence_parallel)
    worst = differences_of(pool, build, parallelize_fn, break_model=partial(by_keyword, break_model))
    assert max(worst.values()) > 10 * TOLERANCE


def by_keyword(break_model: Callable[..., None], model: nn.Module) -> None:
    break_model(model=model)
