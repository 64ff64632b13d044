"""A Llama written by hand in the names of Transformers, with masks and positions as keyword arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fabric_tp
from fabric_tp.architectures import recognise
from fabric_tp.testing.small import randomize
from tests.parity import assert_equal

VOCABULARY, WIDTH, HEAD_SIZE, LENGTH = 96, 96, 8, 12


class Attention(nn.Module):
    def __init__(self, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, HEAD_SIZE
        self.n_rep = n_heads // n_kv_heads
        self.q_proj = nn.Linear(WIDTH, n_heads * HEAD_SIZE, bias=False)
        self.k_proj = nn.Linear(WIDTH, n_kv_heads * HEAD_SIZE, bias=False)
        self.v_proj = nn.Linear(WIDTH, n_kv_heads * HEAD_SIZE, bias=False)
        self.o_proj = nn.Linear(n_heads * HEAD_SIZE, WIDTH, bias=False)

    def forward(self, hidden_states: Tensor, *, attention_mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = hidden_states.shape
        q = self.q_proj(hidden_states).view(b, s, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(hidden_states).view(b, s, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(hidden_states).view(b, s, self.n_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (x.repeat_interleave(self.n_rep, dim=1) for x in (k, v))
        weights = (q @ k.transpose(-1, -2) / self.head_dim**0.5 + attention_mask).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(b, s, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(n_heads, n_kv_heads)
        self.mlp = MLP()
        self.input_layernorm = nn.RMSNorm(WIDTH)
        self.post_attention_layernorm = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.input_layernorm(x)
        x = x + self.self_attn(hidden_states=normed, attention_mask=attention_mask, cos=cos, sin=sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class BaseModel(nn.Module):
    def __init__(self, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(n_heads, n_kv_heads) for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        length = tokens.shape[1]
        angles = torch.outer(torch.arange(length), 1 / 10000 ** (torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE))
        angles = torch.cat((angles, angles), dim=-1)
        seen = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask[:, None, None].bool()
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        for layer in self.layers:
            x = layer(x, attention_mask=mask, cos=angles.cos(), sin=angles.sin())
        return self.norm(x)


class LlamaForCausalLM(nn.Module):
    def __init__(self, n_heads: int = 12, n_kv_heads: int = 3) -> None:
        super().__init__()
        self.base_model = BaseModel(n_heads, n_kv_heads)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return self.lm_head(self.base_model(tokens, attention_mask))


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(LlamaForCausalLM())


def batch(rows: int) -> dict[str, Any]:
    """Rows of different lengths."""
    tokens = torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    lengths = LENGTH - torch.arange(rows) * 2
    return {"tokens": tokens, "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long()}


@pytest.mark.swept(lambda p: p["sizes"] in ((1, 4), (2, 2)) and not p["sequence_parallel"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("sizes", [(1, 2), (1, 3), (1, 4), (2, 2)], ids=str)
def test_twelve_heads_and_three_of_keys_and_values(pool, sizes, sequence_parallel) -> None:
    parallelize_fn = fabric_tp.auto(sequence_parallel=sequence_parallel)
    assert_equal(pool, build, parallelize_fn, sizes, inputs=batch(2 * sizes[0]), steps=3)


def test_is_recognised() -> None:
    assert recognise(build()).name == "base_model"


def test_refuses_heads_that_cannot_be_divided() -> None:
    with pytest.raises(
        ValueError, match=r"tensor_parallel_size=8 does not divide query heads=12 of base_model\.layers"
    ):
        fabric_tp.auto().check(build(), tensor_parallel_size=8)
