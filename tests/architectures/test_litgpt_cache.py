"""Tokens of litgpt's models, generated with a cache, are those of litgpt's own ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fabric_tp
from fabric_tp.architectures.litgpt import cache
from fabric_tp.parallelize import parallelize
from fabric_tp.testing.generation import Generated, compare_generated, prompts
from fabric_tp.testing.small import OWN_GENERATE, small_lora
from tests.architectures.test_litgpt import STRUCTURES, built

CORE = [
    "groups across ranks",
    "norms of heads, local and global positions",  # a window in one of two layers
    "parallel residual, shared norm",  # one key and value head
    "latent attention and experts",
]
SOFTCAPPED = "softcapping, sliding window, post-norms"


def compared(
    pool: Callable, build: Callable[[], nn.Module], sizes: tuple[int, int], break_it: Callable | None = None
) -> Generated:
    parallelize_fn = fabric_tp.litgpt()
    return pool(sizes[0] * sizes[1])(broken_by, break_it, build, parallelize_fn, OWN_GENERATE["litgpt"], sizes)


def broken_by(break_it: Callable[[pytest.MonkeyPatch], None] | None, *args: object) -> Generated | None:
    with pytest.MonkeyPatch.context() as patch:
        if break_it:
            break_it(patch)
        return compare_generated(*args)  # type: ignore[arg-type]


@pytest.mark.swept(lambda p: p["sizes"] != (1, 2) or p["structure"] not in CORE)
@pytest.mark.parametrize("sizes", [(1, 2), (1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_tokens(pool, structure, sizes) -> None:
    generated = compared(pool, built(structure), sizes)
    assert generated.equals_own or structure == SOFTCAPPED, generated
    assert generated.equals_whole, generated


def test_softcapped_prompts_do_not_see_what_comes_later() -> None:
    """litgpt adds its mask of true and false to the scores, which hides nothing; without a cache its model does."""
    model: Any = built(SOFTCAPPED)().eval()
    (prompt,) = prompts((5,))
    with torch.no_grad():
        expected = model(prompt[None])
        ours = cache.LitGPTCache(model, model, [prompt], 1)
        logits, _ = ours.prefill()
        ours.close()
        model.set_kv_cache(1)
        theirs = model(prompt[None], torch.arange(5), input_pos_maxp1=5)
    assert torch.equal(logits, expected)
    assert (theirs - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.swept(lambda p: p["adapted"] != "every layer")
@pytest.mark.parametrize("adapted", ["every layer", "query and value"])
def test_adapters(pool, adapted) -> None:
    generated = compared(pool, partial(small_lora, "Llama-3.2-1B", adapted), (1, 2))
    assert generated.equals_own, generated
    assert generated.equals_whole, generated


def swap_heads(patch: pytest.MonkeyPatch) -> None:
    keep = cache.KeysAndValues.forward

    def swapped(self: cache.KeysAndValues, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        result = keep(self, input_pos, k, v)
        self.k.copy_(self.k.flip(1))
        return result

    patch.setattr(cache.KeysAndValues, "forward", swapped)


def forget_mask(patch: pytest.MonkeyPatch) -> None:
    make = cache.LitGPTCache._make_masks

    def all_visible(self: cache.LitGPTCache, slots: int) -> None:
        make(self, slots)
        self.masks.update({window: torch.zeros_like(mask) for window, mask in self.masks.items()})

    patch.setattr(cache.LitGPTCache, "_make_masks", all_visible)


def forget_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache, "_window", lambda attention: None)


def stay_at_a_position(patch: pytest.MonkeyPatch) -> None:
    step = cache.LitGPTCache.step

    def stayed(self: cache.LitGPTCache, tokens: Tensor) -> tuple[Tensor, Tensor]:
        result = step(self, tokens)
        self.positions = self.lengths[:, None]
        return result

    patch.setattr(cache.LitGPTCache, "step", stayed)


def sum_nothing(patch: pytest.MonkeyPatch) -> None:
    """Layouts of decoding in which attention's output is left a partial sum."""
    set_styles = parallelize.set_decoding_styles

    def partial_sums(plan: dict, model: nn.Module) -> None:
        set_styles(plan | {"transformer.h.*.attn.proj": fabric_tp.styles.Rowwise(None)}, model)

    patch.setattr(parallelize, "set_decoding_styles", partial_sums)


@pytest.mark.parametrize(
    ("break_it", "structure"),
    [
        (swap_heads, "grouped queries"),
        (forget_mask, "grouped queries"),
        (forget_window, "norms of heads, local and global positions"),
        (stay_at_a_position, "grouped queries"),
        (sum_nothing, "grouped queries"),
    ],
)
def test_mistakes_are_noticed(pool, break_it, structure) -> None:
    generated = compared(pool, built(structure), (1, 2), break_it)
    assert not generated.equals_own or not generated.equals_whole
