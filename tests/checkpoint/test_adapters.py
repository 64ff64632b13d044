"""Low-rank adapters from and to litgpt's files, and merged on the mesh."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import GPT, lora
from litgpt.scripts.merge_lora import merge_lora
from litgpt.utils import save_config
from torch import Tensor, nn

import fabric_tp
from fabric_tp.checkpoint.parts import is_adapters
from fabric_tp.shards import gather_shards
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import LORA, randomize, small_config, small_lora
from tests.models import LENGTH, VOCABULARY
from tests.threads import one_thread

RANK = 4
NAMES = ["Llama-3-8B", "pythia-14m", "Gemma-2b", "Mixtral-8x7B-v0.1", "phi-2", "SmolLM2-135M"]
NARROWER = [("Llama-3-8B", "every layer", (2, 2)), ("pythia-14m", "query and value", (1, 2))]


def parallelized(name: str, adapted: str, sizes: tuple[int, int], dtype: torch.dtype = torch.float32) -> nn.Module:
    return fabric_tp.litgpt()(small_lora(name, adapted).to(dtype), mesh(*sizes))


def unparallelized(name: str, adapted: str) -> nn.Module:
    with torch.device("meta"):
        return lora.GPT(small_config(name, lora.Config, lora_r=RANK, **LORA[adapted]))


def base_state(name: str) -> dict[str, Tensor]:
    """What a checkpoint of the model without adapters holds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return dict(randomize(GPT(small_config(name)), seed=6).state_dict())


def base_directory(name: str, adapted: str, folder: Path) -> Path:
    """With all that litgpt insists on."""
    base = folder / "base"
    for directory in (base, folder / "final"):
        directory.mkdir()
        save_config(small_config(name), directory)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (directory / file).write_text("{}")
    torch.save(base_state(name), base / "lit_model.pth")
    given = {"checkpoint_dir": str(base), "lora_r": RANK, **LORA[adapted]}
    (folder / "final" / "hyperparameters.yaml").write_text(yaml.safe_dump(given))
    return base


def load_save_and_merge(
    name: str, adapted: str, sizes: tuple[int, int], folder: Path, times: int, dtype: torch.dtype
) -> None:
    model = parallelized(name, adapted, sizes, dtype)
    before = {key: gather_shards(each).clone() for key, each in model.state_dict().items() if "lora_" in key}
    fabric_tp.checkpoint.litgpt.load(model, folder / "base" / "lit_model.pth")
    after = {key: gather_shards(each) for key, each in model.state_dict().items() if "lora_" in key}
    assert before
    assert all(torch.equal(before[key], after[key]) for key in before)
    fabric_tp.checkpoint.litgpt.save_adapters(model, folder / "final" / "lit_model.pth.lora")
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(model(tokens))
    for _ in range(times):
        fabric_tp.checkpoint.litgpt.merge_adapters(model, unparallelized(name, adapted))
    fabric_tp.checkpoint.litgpt.save(model, folder / "merged.pth", adapters=False)
    if times == 1 and dtype == torch.float32:
        with torch.no_grad():
            torch.testing.assert_close(whole(model(tokens)), expected, rtol=1e-4, atol=1e-4)


def whole(logits: Tensor) -> Tensor:
    return logits.full_tensor() if hasattr(logits, "full_tensor") else logits


def merged_here_and_there(
    pool,
    name: str,
    adapted: str,
    sizes: tuple[int, int],
    folder: Path,
    *,
    times: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], ...]:
    base_directory(name, adapted, folder)
    pool(sizes[0] * sizes[1])(load_save_and_merge, name, adapted, sizes, folder, times, dtype)
    with one_thread():
        merge_lora(folder / "final")
    files = (folder / "merged.pth", folder / "final" / "lit_model.pth")
    return tuple(torch.load(file, weights_only=True) for file in files)


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {key for key in one if not torch.equal(one[key], other[key])}


@pytest.mark.swept(lambda p: (p["name"], p["adapted"], p["sizes"]) not in NARROWER)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("adapted", LORA)
@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_are_bitwise_those_of_litgpt(pool, tmp_path, name, adapted, sizes) -> None:
    here, there = merged_here_and_there(pool, name, adapted, sizes, tmp_path)
    assert differing(here, there) == set()
    changed = differing(here, base_state(name))
    assert all(any(part in key for part in ("attn", "mlp", "lm_head")) for key in changed)
    assert len(changed) > 1
    GPT(small_config(name)).load_state_dict(here)


def test_merged_weights_in_bf16_are_bitwise_those_of_litgpt(pool, tmp_path) -> None:
    here, there = merged_here_and_there(pool, "Llama-3-8B", "every layer", (1, 2), tmp_path, dtype=torch.bfloat16)
    assert differing(here, there) == set()
    assert {each.dtype for each in here.values()} == {torch.bfloat16}


def test_a_wrong_merge_is_noticed(pool, tmp_path) -> None:
    here, there = merged_here_and_there(pool, "Llama-3-8B", "query and value", (1, 2), tmp_path, times=2)
    assert differing(here, there) == {f"transformer.h.{block}.attn.qkv.weight" for block in range(2)}


def test_file_of_adapters_is_that_of_litgpt(pool, tmp_path) -> None:
    pool(2)(save_adapters, "Llama-3-8B", "every layer", tmp_path / "lit_model.pth.lora")
    saved = torch.load(tmp_path / "lit_model.pth.lora", weights_only=True)
    expected = {k: each for k, each in small_lora("Llama-3-8B", "every layer").state_dict().items() if "lora_" in k}
    assert saved.keys() == {"model"}
    assert saved["model"].keys() == expected.keys()
    assert all(torch.equal(saved["model"][key], each) for key, each in expected.items())


def save_adapters(name: str, adapted: str, path: Path) -> None:
    fabric_tp.checkpoint.litgpt.save_adapters(parallelized(name, adapted, (1, 2)), path)


def refusals(folder: Path) -> None:
    plain = fabric_tp.litgpt()(GPT(small_config("Llama-3-8B")), mesh(1, 2))
    with pytest.raises(ValueError, match="no low-rank adapters to save"):
        fabric_tp.checkpoint.litgpt.save_adapters(plain, folder / "lit_model.pth.lora")
    model = parallelized("Llama-3-8B", "every layer", (1, 2))
    before = copy.deepcopy({key: gather_shards(each) for key, each in model.state_dict().items()})
    fewer = unparallelized("Llama-3-8B", "query and value")
    with pytest.raises(ValueError, match=r"has 11 low-rank adapters and the unparallelized one 2, of which 2 "):
        fabric_tp.checkpoint.litgpt.merge_adapters(model, fewer)
    assert all(torch.equal(before[key], gather_shards(each)) for key, each in model.state_dict().items())


def test_refusals(pool, tmp_path) -> None:
    pool(2)(refusals, tmp_path)


def load_files(folder: Path) -> None:
    """Of the model without adapters it must be whole; with them too."""
    state = base_state("Llama-3-8B")
    model = parallelized("Llama-3-8B", "every layer", (1, 2))
    missing = dict(state)
    del missing["transformer.h.1.attn.qkv.weight"]
    if torch.distributed.get_rank() == 0:
        torch.save(missing, folder / "missing.pth")
    torch.distributed.barrier()
    with pytest.raises(ValueError, match=r"lacks 1 keys, such as \['transformer.h.1.attn.qkv.weight'\]"):
        fabric_tp.checkpoint.litgpt.load(model, folder / "missing.pth")
    fabric_tp.checkpoint.litgpt.save(model, folder / "with.pth")
    other = parallelized("Llama-3-8B", "every layer", (1, 2))
    for parameter in other.parameters():
        parameter.detach().to_local().zero_()  # type: ignore[attr-defined]
    fabric_tp.checkpoint.litgpt.load(other, folder / "with.pth")
    expected = model.state_dict()
    assert all(
        torch.equal(gather_shards(each), gather_shards(expected[key])) for key, each in other.state_dict().items()
    )


def test_load(pool, tmp_path) -> None:
    pool(2)(load_files, tmp_path)


def test_no_adapter_is_left_out_of_what_litgpt_calls_one() -> None:
    """The names by which the files are told apart."""
    keys = small_lora("Mixtral-8x7B-v0.1", "every layer").state_dict().keys()
    ours = {key for key in keys if is_adapters(key)}
    assert ours == {key for key in keys if lora.lora_filter(key, None)}
