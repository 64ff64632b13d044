"""Adapters of litgpt's model, in PEFT's layout on Transformers' model of the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from litgpt import GPT, lora
from torch import Tensor, nn

import fabric_tp
from fabric_tp.architectures.litgpt.config import with_adapters
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import LORA, randomize
from tests.checkpoint.shared_families import FAMILIES, config_of, download
from tests.checkpoint.test_huggingface import TOKENS

DENSE = [name for name in FAMILIES if name not in ("Mixtral-8x7B-v0.1", "Qwen3-30B-A3B")]
CORE = ("Llama-3-8B", "pythia-14m", "Phi-3-mini-4k-instruct")
"""Layers by themselves; queries, keys and values in one, head by head; these and the MLP's first two in one."""


def adapted_model(name: str, adapted: str) -> nn.Module:
    model = lora.GPT(with_adapters(config_of(name), lora_r=2, lora_alpha=3, **LORA[adapted]))
    lora.mark_only_lora_as_trainable(model)
    return randomize(model)


def saved(name: str, adapted: str, sizes: tuple[int, int], directory: Path, options: dict[str, Any]) -> Tensor:
    """On a rank: save the adapters, and give the logits."""
    model = fabric_tp.litgpt(loss_parallel=False, **options)(adapted_model(name, adapted), mesh(*sizes))
    fabric_tp.checkpoint.load(model, directory)
    fabric_tp.checkpoint.peft.save(model, directory / "peft", base=directory)
    with torch.no_grad():
        return model(TOKENS)


@pytest.mark.swept(lambda p: p["name"] not in CORE)
@pytest.mark.parametrize(("name", "adapted"), [(name, list(LORA)[i % 2]) for i, name in enumerate(DENSE)])
def test_transformers_model_with_the_adapters_is_the_same(pool, tmp_path, name, adapted) -> None:
    whole = download(name, tmp_path)
    sizes = (2, 2) if name == "Llama-3-8B" else (1, 2)
    logits = pool(sizes[0] * sizes[1])(saved, name, adapted, sizes, tmp_path, {})
    with torch.no_grad():
        without = whole(TOKENS).logits
        model = peft.PeftModel.from_pretrained(whole, tmp_path / "peft").eval()
        expected = model(TOKENS).logits
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (logits - without).abs().max() > 1e-2 * expected.abs().max()
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path)


def refused(name: str, adapted: str, directory: Path) -> str:
    model = GPT(config_of(name)) if adapted == "none" else adapted_model(name, adapted)
    model = fabric_tp.litgpt()(model, mesh(1, 2))
    with pytest.raises(ValueError) as error:
        fabric_tp.checkpoint.peft.save(model, directory)
    return str(error.value)


def test_refused(pool, tmp_path) -> None:
    assert "no low-rank adapters" in pool(2)(refused, "Llama-3-8B", "none", tmp_path / "peft")
    assert "is of an expert" in pool(2)(refused, "Mixtral-8x7B-v0.1", "every layer", tmp_path / "peft")
    assert list(tmp_path.iterdir()) == []
