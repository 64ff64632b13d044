"""lit_model.pth from and to parallelized models; distributed checkpoints across meshes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from litgpt import GPT
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import fabric_tp
from fabric_tp.shards import gather_shards
from fabric_tp.testing.ranks import mesh
from tests.models import build, litgpt_config

NAMES = ["Llama-3-8B", "pythia-14m"]
MESHES = [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2)]

State = dict[str, Tensor]


def parallelized(name: str, sizes: tuple[int, int], scale: float = 1.0) -> nn.Module:
    """``build``'s model with its parameters times ``scale``."""
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return fabric_tp.litgpt()(model, mesh(*sizes))


def save(name: str, sizes: tuple[int, int], path: Path) -> None:
    fabric_tp.checkpoint.litgpt.save(parallelized(name, sizes), path)


def assert_is_original(name: str, model: nn.Module) -> None:
    """Every parameter of the parallelized model is bitwise that of ``build``."""
    expected = dict(parallelized(name, (1, dist.get_world_size())).named_parameters())
    for own, parameter in model.named_parameters():
        assert torch.equal(gather_shards(parameter), gather_shards(expected[own])), own


def load_and_compare(name: str, sizes: tuple[int, int], path: Path) -> None:
    model = parallelized(name, sizes, scale=0.0)
    fabric_tp.checkpoint.litgpt.load(model, path)
    assert_is_original(name, model)


def original(name: str) -> State:
    return dict(build(name).state_dict())


@pytest.mark.swept(lambda p: p["name"] != NAMES[0] and p["sizes"] not in ((1, 2), (2, 2)))
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_saved_file_is_the_unparallelized_model(pool, tmp_path, name, sizes) -> None:
    path = tmp_path / "deep" / "lit_model.pth"
    pool(sizes[0] * sizes[1])(save, name, sizes, path)
    plain = GPT(litgpt_config(name))
    plain.load_state_dict(torch.load(path, weights_only=True), strict=True)
    for key, expected in original(name).items():
        assert torch.equal(plain.state_dict()[key], expected), key


def test_saved_file_holds_no_more_than_its_tensors(pool, tmp_path) -> None:
    path = tmp_path / "lit_model.pth"
    pool(2)(save, "Llama-3-8B", (1, 2), path)
    assert [file.name for file in tmp_path.iterdir()] == ["lit_model.pth"]
    tensors = torch.load(path, weights_only=True).values()
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * 4 for tensor in tensors)


@pytest.mark.swept(lambda p: p["name"] != NAMES[0] and p["sizes"] not in ((1, 2), (2, 2)))
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_load(pool, tmp_path, name, sizes) -> None:
    path = tmp_path / "lit_model.pth"
    torch.save(original(name), path)
    pool(sizes[0] * sizes[1])(load_and_compare, name, sizes, path)


def test_load_at_another_mesh_than_saved(pool, tmp_path) -> None:
    path = tmp_path / "lit_model.pth"
    pool(2)(save, "Llama-3-8B", (1, 2), path)
    pool(4)(load_and_compare, "Llama-3-8B", (2, 2), path)


def test_load_of_a_nested_state_dict(pool, tmp_path) -> None:
    path = tmp_path / "lit_model.pth"
    torch.save({"model": original("Llama-3-8B")}, path)
    pool(2)(load_and_compare, "Llama-3-8B", (1, 2), path)


def rejects(path: Path, message: str) -> None:
    """And leaves the model as it was."""
    model = parallelized("Llama-3-8B", (1, 2))
    with pytest.raises(ValueError, match=message):
        fabric_tp.checkpoint.litgpt.load(model, path)
    assert_is_original("Llama-3-8B", model)


def test_missing_file(pool, tmp_path) -> None:
    pool(2)(rejects, tmp_path / "lit_model.pth", "There is no checkpoint file '.*lit_model.pth'")


def test_missing_key(pool, tmp_path) -> None:
    state = {key: torch.zeros_like(tensor) for key, tensor in original("Llama-3-8B").items()}
    del state["transformer.h.1.attn.qkv.weight"]
    torch.save(state, tmp_path / "lit_model.pth")
    pool(2)(rejects, tmp_path / "lit_model.pth", r"lacks 1 keys, such as \['transformer.h.1.attn.qkv.weight'\]")


def test_unexpected_key(pool, tmp_path) -> None:
    state = {key: torch.zeros_like(tensor) for key, tensor in original("Llama-3-8B").items()}
    torch.save({**state, "transformer.h.2.norm_1.weight": torch.ones(64)}, tmp_path / "lit_model.pth")
    pool(2)(
        rejects, tmp_path / "lit_model.pth", r"1 that the model does not, such as \['transformer.h.2.norm_1.weight'\]"
    )


@pytest.mark.parametrize("key", ["lm_head.weight", "transformer.h.0.attn.qkv.weight", "transformer.ln_f.weight"])
def test_wrong_shape(pool, tmp_path, key) -> None:
    state = {key: torch.zeros_like(tensor) for key, tensor in original("Llama-3-8B").items()}
    shape = (state[key].shape[0] + 8, *state[key].shape[1:])
    torch.save({**state, key: torch.zeros(shape)}, tmp_path / "lit_model.pth")
    numbers = f"{key} has the shape {shape}".replace("(", r"\(").replace(")", r"\)")
    pool(2)(rejects, tmp_path / "lit_model.pth", numbers)


def rejects_raw_load(sizes: tuple[int, int], path: Path) -> None:
    model = parallelized("Llama-3-8B", sizes)
    with pytest.raises(RuntimeError, match=r"Missing key.*qkv\.q\.weight"):
        model.load_state_dict(torch.load(path, weights_only=True))


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=str)
def test_raw_load_of_an_unconverted_checkpoint(pool, tmp_path, sizes) -> None:
    torch.save(original("Llama-3-8B"), tmp_path / "lit_model.pth")
    pool(2)(rejects_raw_load, sizes, tmp_path / "lit_model.pth")


def interrupt_save(path: Path) -> None:
    write = torch.save

    def write_half(state: State, file: Any) -> None:
        write(dict(list(state.items())[: len(state) // 2]), file)
        raise KeyboardInterrupt

    model = parallelized("Llama-3-8B", (1, 1), scale=2.0)
    with mock.patch.object(torch, "save", write_half), pytest.raises(KeyboardInterrupt):
        fabric_tp.checkpoint.litgpt.save(model, path)


def test_interrupted_save_leaves_the_previous_file(pool, tmp_path) -> None:
    path = tmp_path / "lit_model.pth"
    pool(1)(save, "Llama-3-8B", (1, 1), path)
    before = path.read_bytes()
    pool(1)(interrupt_save, path)
    assert path.read_bytes() == before


def save_distributed(name: str, sizes: tuple[int, int], path: Path) -> None:
    dcp.save({"model": parallelized(name, sizes).state_dict()}, checkpoint_id=path)


def load_distributed(name: str, sizes: tuple[int, int], path: Path) -> None:
    model = parallelized(name, sizes, scale=0.0)
    dcp.load({"model": model.state_dict()}, checkpoint_id=path)
    assert_is_original(name, model)


@pytest.mark.swept(lambda p: p["name"] != NAMES[0] and p["sizes"] not in ((1, 4), (2, 2)))
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (2, 2), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_distributed_checkpoint_at_another_mesh(pool, tmp_path, name, sizes) -> None:
    pool(2)(save_distributed, name, (1, 2), tmp_path)
    pool(sizes[0] * sizes[1])(load_distributed, name, sizes, tmp_path)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_checkpoints_of_heads_that_ranks_do_not_divide(pool, tmp_path, sizes) -> None:
    """Nine heads: what four ranks save does not show where any of them ended."""
    name, path = "SmolLM2-135M", tmp_path / "lit_model.pth"
    pool(4)(save, name, (1, 4), path)
    saved = torch.load(path, weights_only=True)
    assert saved.keys() == original(name).keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in original(name).items())
    pool(sizes[0] * sizes[1])(load_and_compare, name, sizes, path)
    pool(4)(save_distributed, name, (1, 4), tmp_path / "distributed")
    pool(sizes[0] * sizes[1])(load_distributed, name, sizes, tmp_path / "distributed")


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.arange(16).view(1, 16)
    fabric_tp.cross_entropy(model(tokens), tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def save_optimizer(sizes: tuple[int, int], path: Path) -> None:
    model = parallelized("Llama-3-8B", sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_step(model, optimizer)
    dcp.save(training_state(model, optimizer), checkpoint_id=path)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    own, of_optimizer = get_state_dict(model, optimizer)
    return {"model": own, "optimizer": of_optimizer}


def moments(sizes: tuple[int, int], path: Path | None) -> dict[str, Tensor]:
    """AdamW's state after a step, or after loading that of another mesh."""
    model = parallelized("Llama-3-8B", sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_step(model, optimizer)
    if path:
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
        loaded = training_state(model, optimizer)
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    return {
        name: gather_shards(optimizer.state[parameter]["exp_avg"]).clone()
        for name, parameter in model.named_parameters()
    }


def test_optimizer_state_at_another_mesh(pool, tmp_path) -> None:
    pool(2)(save_optimizer, (1, 2), tmp_path)
    expected = {name: tensor.clone() for name, tensor in pool(2)(moments, (1, 2), None).items()}
    loaded = pool(4)(moments, (2, 2), tmp_path)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
