"""An encoder with norms after each part, padding masks and sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fabric_tp
from fabric_tp.styles import (
    Colwise,
    GatherOutput,
    Heads,
    PrepareInput,
    Replicated,
    Rowwise,
    ScatterInput,
    ShardHeads,
    VocabParallelEmbedding,
)

VOCABULARY, WIDTH, HEADS, LENGTH, LABELS = 96, 64, 8, 16, 3


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_size = HEADS, WIDTH // HEADS
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.attention_norm = SelfAttention(), nn.LayerNorm(WIDTH)
        self.feed_forward, self.feed_forward_norm = FeedForward(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, mask))
        return self.feed_forward_norm(x + self.feed_forward(x))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.last_norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, LABELS)

    def forward(self, tokens: Tensor, is_token: Tensor) -> Tensor:
        x = self.norm(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])))
        for layer in self.layers:
            x = layer(x, is_token[:, None, None, :])
        x = self.last_norm(x)
        mean = (x * is_token[..., None]).sum(1) / is_token.sum(1, keepdim=True)
        return self.classifier(mean)


PLAN: dict[str, Any] = {
    # The forward adds positions of the whole sequence, so it is whole up to the first layer, which takes its part.
    "tokens": VocabParallelEmbedding("replicate"),
    "positions": Replicated(),
    "norm": Replicated(),
    "layers.0": ScatterInput(),
    # The part of the sequence is gathered where attention and MLP begin, and left behind where they end.
    "layers.*.attention": ShardHeads(Heads(HEADS, HEADS), "sequence", query_counts=["heads"]),
    "layers.*.attention.query": Colwise(None),
    "layers.*.attention.key": Colwise(None),
    "layers.*.attention.value": Colwise(None),
    "layers.*.attention.out": Rowwise("sequence"),
    "layers.*.attention_norm": Replicated("sequence"),  # sees a part: its gradient is summed over the ranks
    "layers.*.feed_forward": PrepareInput("sequence"),
    "layers.*.feed_forward.up": Colwise(None),
    "layers.*.feed_forward.down": Rowwise("sequence"),
    "layers.*.feed_forward_norm": Replicated("sequence"),
    "last_norm": GatherOutput(),  # the mean is over the whole sequence
    "classifier": Replicated(),
}
parallelize_fn = fabric_tp.from_plan(PLAN, blocks="layers")


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return Encoder()


def loss(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output, inputs["tokens"].sum(1) % LABELS)


def inputs() -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens, "is_token": torch.arange(LENGTH) < torch.tensor([[16], [11], [7], [13]])}


if __name__ == "__main__":
    from fabric_tp.testing import check_parity

    print(parallelize_fn.explain(build_model(), tensor_parallel_size=2))
    print(check_parity(build_model, parallelize_fn, inputs(), loss))
