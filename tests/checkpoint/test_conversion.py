"""Each layout of a checkpoint into each other one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from litgpt import GPT
from litgpt.utils import save_config
from torch import nn

import fabric_tp
from fabric_tp.checkpoint import convert
from fabric_tp.checkpoint.parts import whole_tensors
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import small_causal
from tests.checkpoint.shared_families import config_of, download
from tests.checkpoint.test_huggingface import assert_same, changed


def hub(name: str, directory: Path) -> Path:
    """As downloaded, and with a config of litgpt, which has none of that name for so small a model."""
    download(name, directory, max_shard_size="50KB")
    save_config(config_of(name), directory)
    return directory


@pytest.mark.swept(lambda p: p["name"] != "Phi-3-mini-4k-instruct")
@pytest.mark.parametrize("name", ["Phi-3-mini-4k-instruct", "pythia-14m", "Gemma-2-2b", "Mixtral-8x7B-v0.1"])
def test_from_the_hub_and_back_over_every_layout(tmp_path, name) -> None:
    original = hub(name, tmp_path / "hub")
    convert(original, tmp_path / "litgpt", to="litgpt")
    convert(tmp_path / "litgpt", tmp_path / "distributed", to="distributed")
    convert(tmp_path / "distributed", tmp_path / "again", to="huggingface", like=original, max_shard_size="20KB")
    assert_same(tmp_path / "again", original)
    convert(tmp_path / "again", tmp_path / "distributed-2", to="distributed", like=original)
    convert(tmp_path / "distributed-2", tmp_path / "litgpt-2", to="litgpt", like=original)
    one, two = (torch.load(tmp_path / each / "lit_model.pth", weights_only=True) for each in ("litgpt", "litgpt-2"))
    assert all(torch.equal(one[key], two[key]) for key in one.keys() | two.keys())
    GPT(config_of(name)).load_state_dict(one)


def save_training(build: nn.Module, options: dict[str, bool], sizes: tuple[int, int], path: Path) -> None:
    model = fabric_tp.auto(**options)(build, mesh(*sizes))
    optimizer = torch.optim.AdamW(model.parameters())
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, checkpoint_id=path)


@pytest.mark.parametrize("options", [{}, {"replicate_attention": True}], ids=str)
def test_a_training_checkpoint(pool, tmp_path, options) -> None:
    whole = download("Llama-3-8B", tmp_path)
    pool(4)(save_training, whole, options, (2, 2), tmp_path / "step")
    convert(tmp_path / "step", tmp_path / "hub", to="huggingface")  # the config lies beside it
    assert_same(tmp_path / "hub", tmp_path)
    convert(tmp_path / "step", tmp_path / "half", to="huggingface", dtype="bfloat16")
    state = download("Llama-3-8B", tmp_path / "bf16").bfloat16().state_dict()
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def load_distributed(model_type: str, path: Path) -> None:
    assert (path / "meta.pt").is_file()
    model = fabric_tp.auto()(changed(small_causal(model_type)), mesh(1, 2))
    dcp.load({"model": model.state_dict()}, checkpoint_id=path)
    expected = small_causal(model_type).state_dict()
    for name, whole in whole_tensors(model).items():
        assert torch.equal(whole.gather(), expected[name]), name


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_for_a_parallelized_model(pool, tmp_path, model_type) -> None:
    """Parts that lie side by side in rows, and experts in one parameter."""
    small_causal(model_type).save_pretrained(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "distributed", to="distributed")
    convert(tmp_path / "distributed", tmp_path / "again", to="huggingface", like=tmp_path / "hub")
    assert_same(tmp_path / "again", tmp_path / "hub")
    pool(2)(load_distributed, model_type, tmp_path / "distributed")


def test_mistakes(tmp_path) -> None:
    original = hub("Llama-3-8B", tmp_path / "hub")
    with pytest.raises(ValueError, match="exists"):
        convert(original, original, to="litgpt")
    with pytest.raises(ValueError, match="to='pytorch' is no layout"):
        convert(original, tmp_path / "out", to="pytorch")
    with pytest.raises(ValueError, match="dtype='bf16' is none of torch's"):
        convert(original, tmp_path / "out", to="litgpt", dtype="bf16")
    (original / "model_config.yaml").rename(tmp_path / "elsewhere.yaml")
    with pytest.raises(ValueError, match="is neither a name"):
        convert(original, tmp_path / "out", to="litgpt")
    with pytest.raises(ValueError, match="does not fit the model"):
        convert(original, tmp_path / "out", to="litgpt", model_name="Llama-3-8B")
    (original / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has neither model_config.yaml nor config.json"):
        convert(original, tmp_path / "out", to="distributed")
    assert not list(tmp_path.glob("*out*"))
