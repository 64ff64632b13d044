"""Tokens of Transformers' models are those of their own ``generate``, on one device."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import fabric_tp
from fabric_tp.architectures.huggingface.cache import TransformersCache
from fabric_tp.testing.generation import Generated, compare_generated
from fabric_tp.testing.small import OWN_GENERATE, small_causal

CORE = ["mistral", "gpt2", "qwen3_next"]
TYPES = ["llama", "gemma3_text", "deepseek_v3", "gpt_oss", "bloom", "bamba", "mamba2", "opt", "cpmant", "xlstm"]
"""Sliding windows; learned positions; linear attention and its states; and others."""


def compared(pool, model_type: str, sizes: tuple[int, int], forgets: bool = False) -> Generated:
    parallelize_fn = fabric_tp.auto(replicate_attention=model_type in ("qwen3_next", "bamba", "mamba2", "xlstm"))
    build = partial(small_causal, model_type)
    return pool(sizes[0] * sizes[1])(on_rank, forgets, build, parallelize_fn, OWN_GENERATE["huggingface"], sizes)


def on_rank(forgets: bool, *args: object) -> Generated | None:
    with pytest.MonkeyPatch.context() as patch:
        if forgets:
            filled = "fabric_tp.architectures.huggingface.cache._filled_on_the_left"
            patch.setattr(filled, partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_value=1))
        return compare_generated(*args)  # type: ignore[arg-type]


@pytest.mark.swept(lambda p: p["model_type"] not in CORE or p["model_type"] == "qwen3_next" or p["sizes"] != (1, 2))
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("model_type", CORE + TYPES)
def test_tokens(pool, model_type, sizes) -> None:
    generated = compared(pool, model_type, sizes)
    assert generated.equals_own, generated
    assert len(generated.own) == len(generated.parallel)


def test_prompts_on_the_wrong_side_are_noticed(pool) -> None:
    assert not compared(pool, "mistral", (1, 2), forgets=True).equals_own


def test_shapes_are_not_static() -> None:
    model = small_causal("llama")
    with pytest.raises(ValueError, match=r"compile=True needs a cache with static shapes.*LlamaForCausalLM"):
        TransformersCache(model, model, [torch.tensor([1])], 1, static=True)
