"""Attention that draws its masks itself, with this rank's heads: its kernels differ on all ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fabric_tp
from fabric_tp.styles import RandomHeads
from fabric_tp.styles.attention_heads import ShardHeads
from fabric_tp.testing.small import small_transformers
from tests.styles.dropout_runs import follow
from tests.styles.kernels import kernel_masks, random_llama
from tests.styles.table import check, name_of, rows
from tests.styles.test_attention_heads import EXAMPLE as WITHOUT_DROPOUT

EXAMPLE = replace(WITHOUT_DROPOUT, style=RandomHeads, after=follow)


@pytest.mark.parametrize("row", rows(RandomHeads), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=str)
def test_kernels_draw_different_masks_on_all_ranks(pool, sizes) -> None:
    first, second = pool(2)(kernel_masks, sizes, "none")
    assert len(first) == 2
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(mask, other) for mask, other in zip(first, second, strict=True))


def test_kernels_draw_the_same_masks_again(pool) -> None:
    once = pool(2)(kernel_masks, (1, 2), "none")
    for mine, expected in zip(pool(2)(kernel_masks, (1, 2), "full"), once, strict=True):
        assert len(mine) == 4
        assert torch.equal(mine[0], expected[0])
        assert torch.equal(mine[1], expected[1])
        assert {m.numpy().tobytes() for m in mine[2:]} == {m.numpy().tobytes() for m in mine[:2]}


def test_kernels_without_dropout_need_nothing() -> None:
    plan = fabric_tp.auto().plan(small_transformers("Llama"), tensor_parallel_size=2)
    assert type(plan["model.layers.*.self_attn"]) is ShardHeads
    plan = fabric_tp.auto().plan(random_llama(), tensor_parallel_size=2)
    assert type(plan["model.layers.*.self_attn"]) is RandomHeads
