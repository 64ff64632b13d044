"""Any stack of linear layers, embeddings and norms, through ``from_plan``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fabric_tp
from fabric_tp.styles import Colwise, Layout, LMHead, Replicated, Rowwise, VocabParallelEmbedding
from fabric_tp.testing.small import randomize
from tests.models import VOCABULARY
from tests.parity import assert_equal


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(
            nn.Sequential(
                nn.Embedding(VOCABULARY, 32),
                nn.LayerNorm(32),
                nn.Linear(32, 64),
                nn.GELU(),
                nn.Linear(64, 32),
                nn.RMSNorm(32),
                nn.Linear(32, 128, bias=False),
                nn.Tanh(),
                nn.Linear(128, 32, bias=False),
                nn.Linear(32, VOCABULARY),
            )
        )


def plan(layout: Layout, loss_parallel: bool) -> fabric_tp.Parallelize:
    return fabric_tp.from_plan(
        {
            "0": VocabParallelEmbedding(output_layout=layout),
            "1": Replicated(layout),
            "2": Colwise(layout),
            "4": Rowwise(layout),
            "6": Colwise(layout),
            "8": Rowwise(layout),
            "5": Replicated(layout),
            "9": LMHead(input_layout=layout, loss_parallel=loss_parallel),
        }
    )


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("layout", "loss_parallel", "sizes"),
    [
        *((layout, loss_parallel, (1, 2)) for layout in ("sequence", "replicate") for loss_parallel in (True, False)),
        *(("sequence", True, (2, 2)), ("sequence", False, (1, 4))),
        *(("replicate", True, (1, 4)), ("replicate", False, (2, 2))),
    ],
)
def test_stack(pool, layout, loss_parallel, sizes) -> None:
    assert_equal(pool, build, plan(layout, loss_parallel), sizes, steps=3)
