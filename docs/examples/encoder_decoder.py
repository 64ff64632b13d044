"""An encoder and a decoder that attends to what the encoder made; one embedding, which is the head as well."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fabric_tp
from fabric_tp.styles import (
    Colwise,
    Heads,
    LMHead,
    PrepareInput,
    Replicated,
    Rowwise,
    ShardHeads,
    VocabParallelEmbedding,
)

VOCABULARY, WIDTH, HEADS, HEAD_SIZE = 96, 64, 8, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_heads = HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None, causal: bool = False) -> Tensor:
        other = x if memory is None else memory
        q, k, v = (
            layer(given).view(*given.shape[:2], self.n_heads, HEAD_SIZE).transpose(1, 2)
            for layer, given in ((self.q, x), (self.k, other), (self.v, other))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.o(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.relu(self.wi(x)))


class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention, self.mlp = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention, self.cross_attention, self.mlp = Attention(), Attention(), FeedForward()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), causal=True)
        x = x + self.cross_attention(self.norms[1](x), memory)
        return x + self.mlp(self.norms[2](x))


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.encoder = nn.ModuleList(EncoderLayer() for _ in range(2))
        self.memory_norm = nn.LayerNorm(WIDTH)
        self.decoder = nn.ModuleList(DecoderLayer() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.embedding(source)
        for layer in self.encoder:
            memory = layer(memory)
        memory = self.memory_norm(memory)
        x = self.embedding(target)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.head(self.norm(x))


def attention(**options: Any) -> dict[str, Any]:
    projections = {name: Colwise(None) for name in "qkv"}
    return {"": ShardHeads(Heads(HEADS, HEADS), query_counts=["n_heads"], **options), **projections, "o": Rowwise()}


MLP = {"": PrepareInput(), "wi": Colwise(None), "wo": Rowwise()}


def under(path: str, styles: dict[str, Any]) -> dict[str, Any]:
    return {f"{path}.{name}".removesuffix("."): style for name, style in styles.items()}


PLAN: dict[str, Any] = {
    "embedding": VocabParallelEmbedding(),
    "encoder.*.norms.*": Replicated(),
    **under("encoder.*.attention", attention()),
    **under("encoder.*.mlp", MLP),
    "memory_norm": Replicated(),
    "decoder.*.norms.*": Replicated(),
    **under("decoder.*.attention", attention()),
    # Keys and values are made of an argument other than the first: the sum of its gradient belongs there as well.
    **under("decoder.*.cross_attention", attention(key_value_input="memory")),
    **under("decoder.*.mlp", MLP),
    "norm": Replicated(),
    "head": LMHead(),  # leaves the logits split over the vocabulary, for fabric_tp.cross_entropy
}
parallelize_fn = fabric_tp.from_plan(PLAN)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return Translator()


def loss(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return fabric_tp.cross_entropy(logits, inputs["target"].roll(-1, 1))


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(VOCABULARY, (4, 14), generator=generator)
    return {"source": source, "target": torch.randint(VOCABULARY, (4, 12), generator=generator)}


if __name__ == "__main__":
    from fabric_tp.testing import check_parity

    print(parallelize_fn.explain(build_model(), tensor_parallel_size=2))
    print(check_parity(build_model, parallelize_fn, inputs(), loss))
