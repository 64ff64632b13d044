"""What the README shows in Python runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.fabric import as_under_torchrun

BLOCKS = re.findall(r"```python\n(.*?)```", Path(__file__).parents[1].joinpath("README.md").read_text(), re.DOTALL)


def train() -> float:
    """The training loop of the README, on a smaller model, a smaller mesh, and batches for it."""
    script = BLOCKS[0]
    for shown, here in {
        "data_parallel_size=2": "data_parallel_size=1",
        "fabric_tp.launch(strategy)": "fabric_tp.launch(strategy, accelerator='cpu')",
        "tensor_parallel_size=4)": "tensor_parallel_size=2, fail_together=False)",
        'GPT.from_name("Llama-3.2-1B")': 'GPT.from_name("Llama-3.2-1B", n_layer=1, n_embd=64, intermediate_size=64)',
    }.items():
        assert shown in script, f"the README no longer says {shown}"
        script = script.replace(shown, here)
    names: dict[str, Any] = {"dataloader": DataLoader(torch.arange(34).view(2, 17).repeat(3, 1), batch_size=2)}
    with as_under_torchrun():
        exec(script, names)
    return float(names["loss"])


def test_training_loop(pool) -> None:
    assert 0 < pool(2)(train) < 12.5  # it starts at log(128256) = 11.8


def test_explain_and_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="sizes that work for this model are 1, 2, 4, 7, 8"):
        exec(BLOCKS[1], {"torch": torch, "fabric_tp": __import__("fabric_tp"), "GPT": __import__("litgpt").GPT})
    assert "16032 x 4096" in capsys.readouterr().out
