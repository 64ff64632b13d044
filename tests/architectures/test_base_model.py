"""The hand-written Llama with other names for its counts, which repeats keys and takes activations by keyword."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import fabric_tp
from fabric_tp.architectures import recognise
from tests.architectures import hand_written
from tests.architectures.test_hand_written import batch, build
from tests.parity import assert_equal


class Attention(nn.Module):
    def __init__(self, whole: hand_written.Attention) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = whole.num_heads, whole.num_kv_heads, whole.head_dim
        self.n_rep = self.n_heads // self.n_kv_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = whole.q_proj, whole.k_proj, whole.v_proj, whole.o_proj

    def forward(self, *, hidden_states: Tensor, rope: nn.Module, attn_mask: Tensor) -> Tensor:
        b, s, _ = hidden_states.shape
        q = rope(self.q_proj(hidden_states).view(b, s, self.n_heads, self.head_dim).transpose(1, 2))
        k = rope(self.k_proj(hidden_states).view(b, s, self.n_kv_heads, self.head_dim).transpose(1, 2))
        v = self.v_proj(hidden_states).view(b, s, self.n_kv_heads, self.head_dim).transpose(1, 2)
        k, v = (x.repeat_interleave(self.n_rep, dim=1) for x in (k, v))
        weights = (q @ k.transpose(-1, -2) / self.head_dim**0.5 + attn_mask).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(b, s, -1))


class Layer(hand_written.DecoderLayer):
    def forward(self, hidden_states: Tensor, rope: nn.Module, attn_mask: Tensor) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=normed, rope=rope, attn_mask=attn_mask)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def build_other() -> nn.Module:
    model = build()
    for layer in model.get_submodule("base_model.layers"):
        layer.__class__ = Layer
        layer.self_attn = Attention(layer.self_attn)  # type: ignore[assignment, arg-type]
    return model


@pytest.mark.sweep
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("sizes", [(1, 2), (1, 3), (1, 4), (2, 2)], ids=str)
def test_twelve_heads_and_three_of_keys_and_values(pool, sizes, sequence_parallel) -> None:
    parallelize_fn = fabric_tp.auto(sequence_parallel=sequence_parallel)
    assert_equal(pool, build_other, parallelize_fn, sizes, inputs=batch(2 * sizes[0]), steps=3)


def test_is_recognised() -> None:
    assert recognise(build_other()).name == "base_model"


def test_twelve_heads_on_eight_ranks() -> None:
    fabric_tp.auto().check(build_other(), tensor_parallel_size=8)
