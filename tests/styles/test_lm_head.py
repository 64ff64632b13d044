"""The last linear layer, split by rows of the vocabulary."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from fabric_tp.measure.communication import CollectiveCounter
from fabric_tp.styles import LMHead
from fabric_tp.testing.ranks import mesh
from tests.styles.modules import linear
from tests.styles.table import SIZES, Example, check, name_of, rows

EXAMPLE = Example(LMHead, partial(linear, "h", "v"))


@pytest.mark.parametrize("row", rows(LMHead), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


def run(loss_parallel: bool, fused_loss: bool) -> None:
    head = LMHead("sequence", loss_parallel=loss_parallel, fused_loss=fused_loss)
    module = head._apply(linear("h", "v"), mesh(1, 2)["tensor_parallel"])
    with CollectiveCounter(mesh(1, 2)) as counter:
        logits = module(torch.randn(SIZES["b"], SIZES["s"] // 2, SIZES["h"]))
    assert logits.shape == (SIZES["b"], SIZES["s"], SIZES["v"])
    assert len(counter.collectives) == (0 if fused_loss else 1 if loss_parallel else 2)
    if loss_parallel and not fused_loss:
        assert isinstance(logits, DTensor)
        assert logits.placements == (Shard(2),)


@pytest.mark.parametrize("fused_loss", [True, False])
@pytest.mark.parametrize("loss_parallel", [True, False])
def test_logits(pool, loss_parallel, fused_loss) -> None:
    """With ``loss_parallel`` they are a DTensor; with ``fused_loss`` nothing is computed before somebody asks."""
    pool(2)(run, loss_parallel, fused_loss)


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(("module", "layout"), [(Scaled(4, 4), "replicate"), (nn.Linear(4, 4), None)])
def test_fused_loss_is_refused_where_the_head_is_not_plain(module, layout) -> None:
    LMHead(layout).validate(module)
    with pytest.raises(ValueError, match=r"fused_loss=True needs a head .* Use fused_loss=False"):
        LMHead(layout, fused_loss=True).validate(module)
