"""A Llama as people write it by hand for pretraining: names of Transformers, no config, masks as arguments.

Its forward is what users have; nothing in it is made to suit tensor parallelism. Attention ends with a reshape to
``hidden_size``; one rotary module, whose tables are made in ``__init__``, is handed to every layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDING = 0


class RotaryEmbedding(nn.Module):
    def __init__(self, head_dim: int, max_length: int, base: float = 10000.0) -> None:
        super().__init__()
        inverse_frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(max_length).float(), inverse_frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-2]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (x * self.cos[:length] + turned * self.sin[:length]).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.num_kv_heads = num_kv_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, rope: RotaryEmbedding, attn_mask: Tensor) -> Tensor:
        bs, seq_len, _ = hidden_states.shape
        q = self.q_proj(hidden_states).view(bs, seq_len, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(hidden_states).view(bs, seq_len, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(hidden_states).view(bs, seq_len, self.num_kv_heads, self.head_dim).transpose(1, 2)
        attn_output = F.scaled_dot_product_attention(rope(q), rope(k), v, attn_mask=attn_mask, enable_gqa=True)
        attn_output = attn_output.transpose(1, 2).reshape(bs, seq_len, self.hidden_size)
        return self.o_proj(attn_output)


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden_size)
        self.self_attn = Attention(hidden_size, num_heads, num_kv_heads)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size)
        self.mlp = MLP(hidden_size, 4 * hidden_size)

    def forward(self, hidden_states: Tensor, rope: RotaryEmbedding, attn_mask: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), rope, attn_mask)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class BaseModel(nn.Module):
    def __init__(
        self, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, max_length: int
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.rotary_emb = RotaryEmbedding(hidden_size // num_heads, max_length)
        self.layers = nn.ModuleList(DecoderLayer(hidden_size, num_heads, num_kv_heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(hidden_size)

    def forward(self, input_ids: Tensor, attn_mask: Tensor) -> Tensor:
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, rope=self.rotary_emb, attn_mask=attn_mask)
        return self.norm(hidden_states)


class LlamaForCausalLM(nn.Module):
    def __init__(
        self,
        vocab_size: int = 50_000,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        num_kv_heads: int = 3,
        max_length: int = 1024,
    ) -> None:
        super().__init__()
        self.base_model = BaseModel(vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, max_length)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, input_ids: Tensor, attn_mask: Tensor) -> Tensor:
        return self.lm_head(self.base_model(input_ids, attn_mask))


def causal_and_padding(input_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(b, 1, s, s)``: minus infinity where a position may not look."""
    length = input_ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (input_ids != PADDING)[:, None, :]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)[:, None]
