"""A model that is recognised by its structure alone is run before it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fabric_tp
from fabric_tp.architectures import BASE_MODEL, HUGGINGFACE
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import small_config, small_gpt, small_transformers
from tests.architectures import hand_written
from tests.architectures.test_hand_written import VOCABULARY, WIDTH, build


def parallelized(build_model: Callable[[], nn.Module], options: dict[str, Any]) -> list[str]:
    """Its training mode and random state, and what was warned of."""
    model = build_model()
    state = torch.get_rng_state()
    blocks = len(model.get_submodule("base_model.layers")) if hasattr(model, "base_model") else 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = fabric_tp.auto(**options)(model, mesh(1, 2))
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert not blocks or len(model.get_submodule("base_model.layers")) == blocks
    return [str(each.message) for each in warned if "verified" in str(each.message)]


# What is wrong, and only shows on several ranks. Each keeps the names and the shapes of the hand-written model.


class CountsFeatures(hand_written.Attention):
    """Another attribute than those that are known to count."""

    def forward(self, hidden_states: Tensor, rope: Any, attn_mask: Tensor) -> Tensor:
        self.all_features = WIDTH
        bs, seq_len, _ = hidden_states.shape
        q = self.q_proj(hidden_states).view(bs, seq_len, -1, self.head_dim).transpose(1, 2)
        return self.o_proj(q.transpose(1, 2).reshape(bs, seq_len, self.all_features))


class NormOverHeads(hand_written.Attention):
    """Without a parameter that would say so."""

    def forward(self, hidden_states: Tensor, rope: Any, attn_mask: Tensor) -> Tensor:
        q = self.q_proj(hidden_states)
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6)
        return self.o_proj(q)


class GateInTheOtherHalf(hand_written.MLP):
    """The hidden width is split once more, in halves that no rank has whole."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.up_proj(x).chunk(2, dim=-1)
        return self.down_proj(torch.cat((second * self.gate_proj(x).chunk(2, dim=-1)[0], first), dim=-1))


class DropsByItself(hand_written.MLP):
    """In training only, and without a module that would say so."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.dropout(self.up_proj(x) * self.gate_proj(x), 0.1, self.training))


class Remembers(hand_written.Attention):
    """Keeps a state of one forward for the next, as a plain attribute."""

    state: Tensor

    def forward(self, hidden_states: Tensor, rope: Any, attn_mask: Tensor) -> Tensor:
        output = super().forward(hidden_states, rope, attn_mask)
        self.state = self.state + output.mean()
        return output


class HeadsOfOthers(hand_written.Attention):
    """Each head is weighted by its number."""

    def forward(self, hidden_states: Tensor, rope: Any, attn_mask: Tensor) -> Tensor:
        bs, seq_len, _ = hidden_states.shape
        q = self.q_proj(hidden_states).view(bs, seq_len, self.num_heads, self.head_dim)
        q = q * torch.arange(self.num_heads, dtype=q.dtype)[:, None]
        return self.o_proj(q.flatten(2))


def with_parts(attention: type[nn.Module] | None = None, mlp: type[nn.Module] | None = None) -> nn.Module:
    model = build()
    for layer in model.get_submodule("base_model.layers"):
        for name, kind in (("self_attn", attention), ("mlp", mlp)):
            if kind:
                layer.get_submodule(name).__class__ = kind
    return model


WRONG = {
    "norm": ({"attention": NormOverHeads}, r"base_model\.layers\.0 gives something else on 2 ranks .* verify=False"),
    "gate": ({"mlp": GateInTheOtherHalf}, r"base_model\.layers\.0 gives something else on 2 ranks"),
    "dropout": ({"mlp": DropsByItself}, r"base_model\.layers\.0\.mlp draws random numbers in its forward \(\w+\), and"),
    "heads": ({"attention": HeadsOfOthers}, r"base_model\.layers\.0 gives something else on 2 ranks"),
    "count": (
        {"attention": CountsFeatures},
        r"base_model\.layers\.0\.self_attn \(CountsFeatures\) cannot run .* `return",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_refused(pool, kind) -> None:
    parts, message = WRONG[kind]
    with pytest.raises(AssertionError, match=f"ValueError: {message}"):
        pool(2)(parallelized, partial(with_parts, **parts), {})


@pytest.mark.parametrize("kind", WRONG)
def test_unless_nobody_looks(pool, kind) -> None:
    assert pool(2)(parallelized, partial(with_parts, **WRONG[kind][0]), {"verify": False}) == []


@pytest.mark.parametrize("options", [{}, {"sequence_parallel": False}, {"fused_loss": True}, {"verify": True}], ids=str)
def test_what_is_right_stays_as_it_was(pool, options) -> None:
    assert pool(2)(parallelized, build, options) == []


def state_is_as_before() -> bool:
    model = with_parts(attention=Remembers)
    (attention, *_) = attentions = [module for module in model.modules() if isinstance(module, Remembers)]
    state = torch.zeros(3)
    for each in attentions:
        each.state = state
    fabric_tp.auto()(model, mesh(1, 2))
    return attention.state is state


def test_nothing_is_left_behind(pool) -> None:
    assert pool(2)(state_is_as_before)


def test_a_check_needs_neither_ranks_nor_memory() -> None:
    with torch.device("meta"):
        model = hand_written.LlamaForCausalLM(VOCABULARY, WIDTH)
    for layer in model.get_submodule("base_model.layers"):
        layer.get_submodule("self_attn").__class__ = CountsFeatures
    with pytest.raises(ValueError, match=r"CountsFeatures\) cannot run .* at test_verification\.py:\d+"):
        fabric_tp.auto().check(model, tensor_parallel_size=4)
    assert next(model.parameters()).is_meta


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_check_passes_what_is_right(size) -> None:
    fabric_tp.auto(verify=True).check(build(), tensor_parallel_size=size)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = build()
        self.base_model, self.lm_head = self.inner.base_model, self.inner.lm_head
        del self.inner

    def forward(self, input_ids: Tensor, something: object) -> Tensor:
        return self.lm_head(self.base_model(input_ids, something))


class WithoutNames(Unknown):
    """Hands on what it is given, as PEFT's models do."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.lm_head(self.base_model(*args, **kwargs))


@pytest.mark.parametrize(
    ("model", "arguments"), [(Unknown, "input_ids, something"), (WithoutNames, "arguments without names")]
)
def test_arguments_that_nobody_knows_are_a_warning(pool, model, arguments) -> None:
    (warning,) = pool(2)(parallelized, model, {})
    assert f"its forward takes {arguments}" in warning
    assert "check_parity" in warning


def test_or_an_error_where_it_must_be_verified(pool) -> None:
    with pytest.raises(AssertionError, match=r"ValueError: Whether this Unknown is parallelized right could not be"):
        pool(2)(parallelized, Unknown, {"verify": True})


@pytest.mark.swept(lambda p: "Gemma3" in str(p["build_model"]) or "Mixtral" in str(p["build_model"]))
@pytest.mark.parametrize(
    "build_model",
    [
        partial(small_gpt, small_config("Llama-3-8B", n_head=8, n_query_groups=4)),
        partial(small_gpt, small_config("Mixtral-8x7B-v0.1", n_head=8, n_query_groups=4)),
        partial(small_transformers, "Gemma3, six layers"),
        partial(small_transformers, "GPT-NeoX"),
    ],
    ids=["llama", "experts", "gemma3", "gpt_neox"],
)
def test_any_model_can_be_verified(pool, build_model) -> None:
    fabric_tp.auto(verify=True).check(build_model(), tensor_parallel_size=2)
    assert pool(2)(parallelized, build_model, {"verify": True}) == []


def test_classes_that_are_tested_are_left_in_peace() -> None:
    model = small_transformers("Llama")
    assert f"{type(model).__module__}.{type(model).__qualname__}" in HUGGINGFACE.tested
    assert fabric_tp.auto().derive(model, 2).verify == "no"
    assert fabric_tp.auto().derive(build(), 2).verify == "try"
    assert BASE_MODEL.tested == ()
