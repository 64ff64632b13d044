"""A vision transformer: patches by a convolution, a class token, queries, keys and values in one layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fabric_tp
from fabric_tp.styles import Colwise, FusedColwise, Heads, Replicated, Rowwise, ShardHeads

WIDTH, HEADS, CLASSES = 48, 6, 10


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(WIDTH, 4 * WIDTH))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, kernel_size=4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


PLAN: dict[str, Any] = {
    "": Replicated(),  # the model's own parameters: cls_token and pos_embed
    "patch_embed": Replicated(),
    "blocks.*.norm1": Replicated(),
    # Each rank computes with some of the heads. The forward takes C from its input, and means all heads' features.
    "blocks.*.attn": ShardHeads(Heads(HEADS, HEADS), query_counts=["num_heads"], measures_input=True),
    "blocks.*.attn.qkv": FusedColwise({"q": WIDTH, "k": WIDTH, "v": WIDTH}, None),
    "blocks.*.attn.proj": Rowwise(),
    "blocks.*.norm2": Replicated(),
    "blocks.*.mlp.fc1": Colwise(),
    "blocks.*.mlp.fc2": Rowwise(),
    "norm": Replicated(),
    "head": Replicated(),
}
parallelize_fn = fabric_tp.from_plan(PLAN, blocks="blocks")


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer()


def loss(output: Tensor, images: Tensor) -> Tensor:
    return F.cross_entropy(output, images.flatten(1).argmax(1) % CLASSES)


def inputs() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    from fabric_tp.testing import check_parity

    print(parallelize_fn.explain(build_model(), tensor_parallel_size=2))
    print(check_parity(build_model, parallelize_fn, inputs(), loss))
