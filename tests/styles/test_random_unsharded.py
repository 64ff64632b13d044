"""Attention that draws its masks itself and is whole on every rank: all draw the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fabric_tp.styles import RandomUnsharded
from tests.styles.dropout_runs import follow
from tests.styles.kernels import kernel_masks
from tests.styles.table import check, name_of, rows
from tests.styles.test_unsharded import EXAMPLE as WITHOUT_DROPOUT

EXAMPLE = replace(WITHOUT_DROPOUT, style=RandomUnsharded, after=follow)


@pytest.mark.parametrize("row", rows(RandomUnsharded), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


def test_kernels_of_replicated_attention_draw_the_same(pool) -> None:
    first, second = pool(2)(kernel_masks, (1, 2), "none", replicate_attention=True)
    assert all(torch.equal(mask, other) for mask, other in zip(first, second, strict=True))
