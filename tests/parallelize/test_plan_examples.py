"""The plans that docs/plans.rst shows are right."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import fabric_tp
from fabric_tp.styles import Replicated
from fabric_tp.testing import Report
from fabric_tp.testing.parity import TOLERANCE, compare
from tests.programs import finish, python, start

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = {path.stem: path for path in DOCS.glob("examples/*.py")}


def differences(path: Path, sizes: tuple[int, int], plan: dict[str, Any] | None = None) -> dict[str, float]:
    example = runpy.run_path(str(path))
    parallelize_fn = fabric_tp.from_plan(example["PLAN"] | plan) if plan else example["parallelize_fn"]
    return compare(example["build_model"], parallelize_fn, example["inputs"](), example["loss"], sizes, 3)


@pytest.mark.swept(lambda p: p["sizes"] == (2, 2) or p["name"] == "encoder")
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_equals_one_device(pool, name, sizes) -> None:
    report = Report(pool(sizes[0] * sizes[1])(differences, EXAMPLES[name], sizes))
    assert report.equal, str(report)


def test_a_norm_that_is_said_to_see_all_is_noticed(pool) -> None:
    wrong = pool(2)(differences, EXAMPLES["encoder"], (1, 2), {"layers.*.attention_norm": Replicated()})
    assert max(wrong.values()) > 10 * TOLERANCE


@pytest.mark.sweep
def test_runs_by_itself(tmp_path) -> None:
    printed = finish([start([*python(), str(EXAMPLES["encoder"])], tmp_path / "output")])
    assert "layers.*.feed_forward.up x 2" in printed
    assert re.search(r"^equal to one device: of \d+ tensors", printed, re.MULTILINE)


def test_the_page_shows_all() -> None:
    shown = re.findall(r"literalinclude:: examples/(\w+)\.py", (DOCS / "plans.rst").read_text())
    assert sorted(shown) == sorted(EXAMPLES)
