"""Both plans on one type of model."""

from __future__ import annotations

import re
from functools import partial

import pytest

from benchmarks import transformers_plan
from fabric_tp.testing.ranks import Ranks


@pytest.mark.sweep
def test_counts_what_is_right(monkeypatch, forks, capsys) -> None:
    monkeypatch.setattr(transformers_plan, "Ranks", partial(Ranks, start=forks))
    transformers_plan.main(only="qwen3_moe")
    *_, line, total = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"qwen3_moe( +\d\.\de-\d\d){4}", line)
    assert total == "right, of 1: " + ", ".join(
        f"{whose} {what} 1" for whose in ("Transformers'", "fabric_tp's") for what in ("output", "gradients")
    )
