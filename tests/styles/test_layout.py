"""Where activations pass from one layout to another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fabric_tp.autograd.collectives import Group
from fabric_tp.measure.communication import CollectiveCounter
from fabric_tp.styles import Style, layout
from fabric_tp.styles.style import Parallelized
from fabric_tp.testing.ranks import mesh
from tests.styles.table import Row, name_of, rows


def collectives(function: str, into: Any) -> dict[str, str]:
    """What the function issues in a forward and a backward."""
    tensor_parallel = mesh(1, 2)["tensor_parallel"]
    this = Parallelized(Style(), tensor_parallel, Group.of(tensor_parallel))
    x = torch.zeros(3, 8, 4, requires_grad=True)
    with CollectiveCounter(mesh(1, 2)) as counter:
        counter.phase = "forward"
        y: Tensor = getattr(layout, function)(this, x, into)
        counter.phase = "backward"
        y.sum().backward()
    assert x.grad is not None
    return {
        phase: ", ".join(each.kind for each in counter.collectives if each.phase == phase)
        for phase in ("forward", "backward")
    }


@pytest.mark.parametrize("row", rows(layout), ids=name_of)
def test_table(pool, row: Row) -> None:
    function, into = (
        eval(row[name].strip("`"), {each: each for each in vars(layout)}) for name in ("function", "layout")
    )
    said = layout.entering(into, regather=False) if function == "enter_sharded" else layout.leaving(into)
    documented = {"forward": row["forward"], "backward": row["backward"]}
    assert pool(2)(collectives, function, into) == documented == dict(zip(documented, said, strict=True))


def test_what_is_said_of_both() -> None:
    assert layout.join(layout.entering("sequence", True), layout.leaving("sequence")) == (
        "all-gather + reduce-scatter",
        "reduce-scatter + all-gather again + all-gather",
    )
    assert layout.join(layout.entering("replicate", True), layout.leaving("replicate")) == ("all-reduce", "all-reduce")
    assert layout.join(layout.entering(None, True), layout.leaving(None)) == ("", "")
