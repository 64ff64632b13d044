"""Small models that keep the structure of the large ones, and random parameters that hide no mistake."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from litgpt import GPT, Config
from torch import Tensor, nn

VOCABULARY, LENGTH = 96, 16

CONFIGS = {
    "Llama-3-8B": {"n_head": 8, "n_query_groups": 4},
    "Llama-2-7b-hf": {"n_head": 8},
    "pythia-14m": {"n_head": 8},
    "falcon-7b": {"n_head": 8, "n_query_groups": 4},
    "falcon-40b": {"n_head": 8, "n_query_groups": 4},
    "phi-2": {"n_head": 8},
    "SmolLM2-135M": {"n_head": 9, "n_query_groups": 3},
    "Mixtral-8x7B-v0.1": {"n_head": 8, "n_query_groups": 4, "n_expert": 4},
}


def litgpt_config(name: str, **overrides: object) -> Config:
    sizes = {
        "n_layer": 2,
        "n_embd": 64,
        "head_size": 8,
        "intermediate_size": 96,
        "block_size": 64,
        "vocab_size": VOCABULARY,
        "padded_vocab_size": VOCABULARY,
    }
    return Config.from_name(name, **{**sizes, **CONFIGS[name], **overrides})


class Attention(nn.Module):
    """Attention as in Meta's reference implementation, with grouped keys and values."""

    def __init__(self, width: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, width // n_heads
        self.wq = nn.Linear(width, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(width, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, width, bias=False)

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = rotate(self.wq(x).view(b, s, self.n_heads, self.head_dim), freqs).transpose(1, 2)
        k = rotate(self.wk(x).view(b, s, self.n_kv_heads, self.head_dim), freqs).transpose(1, 2)
        v = self.wv(x).view(b, s, self.n_kv_heads, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(b, s, self.n_heads * self.head_dim))


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = freqs.cos()[None, :, None], freqs.sin()[None, :, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class FeedForward(nn.Module):
    """The MLP of Lightning's tensor-parallel guide."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, width: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, n_heads, n_kv_heads)
        self.feed_forward = FeedForward(width, 2 * width)
        self.attention_norm = nn.RMSNorm(width)
        self.ffn_norm = nn.RMSNorm(width)

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), freqs)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """A Llama in Meta's names."""

    def __init__(self, n_layers: int = 2, width: int = 64, n_heads: int = 8, n_kv_heads: int = 4) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleDict({str(i): Layer(width, n_heads, n_kv_heads) for i in range(n_layers)})
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, VOCABULARY, bias=False)
        self.head_dim = width // n_heads

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        scale = 1.0 / 10000 ** (torch.arange(0, self.head_dim, 2, dtype=x.dtype) / self.head_dim)
        freqs = torch.outer(torch.arange(tokens.shape[1], dtype=x.dtype), scale)
        for layer in self.layers.values():
            x = layer(x, freqs)
        return self.output(self.norm(x))


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with random parameters, norm weights and biases included, the same wherever it is built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module
        if name == "llama":
            model = Llama()
        elif name == "feed_forward":
            model = FeedForward(64, 96)
        else:
            model = GPT(litgpt_config(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)
