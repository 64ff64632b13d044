"""Small models with dropout wherever it can be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from litgpt import GPT, lora
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fabric_tp.autograd.dropout import Mask, dropped
from fabric_tp.seeds import mix
from fabric_tp.testing.small import LORA, randomize, small_config
from tests.models import FeedForward, Llama, litgpt_config, rotate

RATE = 0.2


class DropoutAttention(nn.Module):
    """Attention with probabilities of its own, and dropouts on them, before and after the last layer."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_heads, width // n_heads
        for name in ("wq", "wk", "wv", "wo"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.probabilities = nn.Dropout(RATE)
        self.both = nn.Dropout(RATE)

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (self.n_heads, -1)) for each in (self.wq, self.wk, self.wv))
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q, freqs), rotate(k, freqs)) / self.head_dim**0.5
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        shares = self.probabilities(scores.masked_fill(~causal, -torch.inf).softmax(-1))
        y = torch.einsum("bhqk,bkhd->bqhd", shares, v).flatten(2)
        return self.both(self.wo(self.both(y)))


class DropoutFeedForward(FeedForward):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.hidden, self.last = nn.Dropout(RATE), nn.Dropout(RATE, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.w2(self.hidden(F.silu(self.w1(x)) * self.w3(x))))


class DropoutLlama(Llama):
    """A Llama with dropout wherever it can be; ``checkpointed``: "no", "reentrant", "yes" or "wrongly"."""

    def __init__(self, checkpointed: str = "no", hidden: int = 96) -> None:
        super().__init__()
        for layer in self.layers.values():
            layer.attention = DropoutAttention(64, 8)
            layer.feed_forward = DropoutFeedForward(64, hidden)
            layer.register_forward_hook(lambda module, args, y: module.get_submodule("residual")(y))
            layer.residual = nn.Dropout(RATE)
        self.embedding_dropout, self.checkpointed = nn.Dropout(RATE), checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding_dropout(self.tok_embeddings(tokens))
        scale = 1.0 / 10000 ** (torch.arange(0, self.head_dim, 2, dtype=x.dtype) / self.head_dim)
        freqs = torch.outer(torch.arange(tokens.shape[1], dtype=x.dtype), scale)
        options = {
            "use_reentrant": self.checkpointed == "reentrant",
            "preserve_rng_state": self.checkpointed != "wrongly",
        }
        for layer in self.layers.values():
            x = layer(x, freqs) if self.checkpointed == "no" else checkpoint(layer, x, freqs, **options)
        return self.output(self.norm(x))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(make())


def everywhere(checkpointed: str = "no") -> nn.Module:
    return seeded(partial(DropoutLlama, checkpointed))


def residual(name: str = "Llama-3-8B") -> nn.Module:
    """litgpt with dropouts in the places of norms that this model lacks."""
    model: Any = seeded(lambda: GPT(litgpt_config(name)))
    for block in model.transformer.h:
        block.post_attention_norm, block.post_mlp_norm = nn.Dropout(RATE), nn.Dropout(RATE)
    return model


def adapters(name: str = "Llama-3-8B") -> nn.Module:
    config = small_config(name, lora.Config, lora_r=4, lora_dropout=0.1, **LORA["every layer"])
    model = seeded(lambda: lora.GPT(config))
    lora.mark_only_lora_as_trainable(model)
    return model


MODELS = {
    "everywhere": everywhere,
    "residual": residual,
    "shared norm": partial(residual, "falcon-7b"),
    "adapters": adapters,
}


class ExplicitDropout(nn.Module):
    """Multiplies by the mask that the module of this name should have, in the first forward of the run."""

    def __init__(self, name: str, rate: float) -> None:
        super().__init__()
        self.name, self.rate, self.calls = name, rate, 0

    def forward(self, x: Tensor) -> Tensor:
        drops = dropped(x.shape, Mask(self.rate, mix(7, self.name, self.calls)), x.device)
        self.calls += 1
        return x * ~drops / (1 - self.rate)
