"""The Llama of PyTorch's and Lightning's tensor-parallel examples, written anew: the same modules, the same maths.

They differ in how their blocks are kept, in where the table of rotations is cut, and in whether it can be made again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import FeedForward


def rotations(head_dim: int, length: int) -> Tensor:
    """Complex ``(length, head_dim / 2)``."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=frequencies.device), frequencies).float()
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    table = table[: x.shape[1]].view(1, pairs.shape[1], 1, pairs.shape[-1])
    return torch.view_as_real(pairs * table).flatten(3).type_as(x)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    batch, length, heads, size = x.shape
    if n_rep == 1:
        return x
    return x[:, :, :, None, :].expand(batch, length, heads, n_rep, size).reshape(batch, length, heads * n_rep, size)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.n_rep, self.head_dim = n_heads // n_kv_heads, dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        batch, length, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = rotate(xq.view(batch, length, self.n_heads, self.head_dim), freqs_cis)
        xk = rotate(xk.view(batch, length, self.n_kv_heads, self.head_dim), freqs_cis)
        xv = xv.view(batch, length, self.n_kv_heads, self.head_dim)
        keys, values = repeat_kv(xk, self.n_rep), repeat_kv(xv, self.n_rep)
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        output = F.scaled_dot_product_attention(xq, keys, values, is_causal=True)
        return self.wo(output.transpose(1, 2).contiguous().view(batch, length, -1))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, multiple_of: int) -> None:
        super().__init__()
        self.n_heads, self.dim = n_heads, dim
        self.attention = Attention(dim, n_heads, n_kv_heads)
        self.feed_forward = FeedForward(dim, multiple_of * -(-int(8 * dim / 3) // multiple_of))
        self.attention_norm = RMSNorm(dim)
        self.ffn_norm = RMSNorm(dim)

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis)
        return h + self.feed_forward(self.ffn_norm(h))


class PyTorchTransformer(nn.Module):
    def __init__(
        self, vocabulary: int, dim: int = 64, n_layers: int = 2, n_heads: int = 8, n_kv_heads: int = 4
    ) -> None:
        super().__init__()
        self.head_dim, self.max_length = dim // n_heads, 64
        self.tok_embeddings = nn.Embedding(vocabulary, dim)
        self.register_buffer("freqs_cis", rotations(self.head_dim, 2 * self.max_length))
        self.layers = self.held([TransformerBlock(dim, n_heads, n_kv_heads, 16) for _ in range(n_layers)])
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, vocabulary, bias=False)

    def held(self, blocks: list[nn.Module]) -> nn.Module:
        return nn.ModuleList(blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        self.freqs_cis = self.freqs_cis.to(h.device)
        freqs_cis = self.freqs_cis[0 : tokens.shape[1]]
        for layer in self.layers:
            h = layer(h, freqs_cis)
        return self.output(self.norm(h)).float()


class LightningTransformer(PyTorchTransformer):
    def held(self, blocks: list[nn.Module]) -> nn.Module:
        return nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})

    def reset_parameters(self) -> None:
        with torch.device(self.freqs_cis.device):
            self.freqs_cis = rotations(self.head_dim, 2 * self.max_length)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h, self.freqs_cis)  # which is cut where it is used
        return self.output(self.norm(h))
