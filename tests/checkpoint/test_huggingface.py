"""Directories of the hub into parallelized models of litgpt and Transformers, and out of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from litgpt import GPT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fabric_tp
from fabric_tp.checkpoint import huggingface, writing
from fabric_tp.checkpoint.files import Files
from fabric_tp.parallelize.expected import first_tensor
from fabric_tp.random.initial import initialize
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import causal_types, small_causal, small_config, small_inputs
from tests.checkpoint.shared_families import FAMILIES, config_of, download, transformers_model

MESHES = [(1, 2), (2, 2), (1, 4)]
TYPES = [
    *("llama", "mixtral", "gpt2", "phi3", "deepseek_v3", "gemma3_text", "gpt_oss", "qwen3_moe", "jamba"),
    *("nemotron_h", "bloom", "falcon", "gpt_neox", "phimoe", "bert"),
]
TOKENS = torch.randint(90, (2, 12), generator=torch.Generator().manual_seed(0))


def changed(model: nn.Module) -> nn.Module:
    """With other values, in which a layer is still what its plan says it is."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def litgpt_round_trip(name: str, sizes: tuple[int, int], directory: Path) -> Tensor:
    """On a rank: load, save, and give the logits."""
    model = fabric_tp.litgpt(loss_parallel=False)(changed(GPT(config_of(name))), mesh(*sizes))
    huggingface.load(model, directory, progress=False)
    huggingface.save(model, directory / "again", like=directory, max_shard_size="30KB")
    with torch.no_grad():
        return model(TOKENS)


def assert_same(saved: Path, original: Path) -> None:
    """All tensors, bit for bit, by the names of the hub."""
    with Files(saved) as one, Files(original) as other:
        assert one.shapes == other.shapes
        for name in other.shapes:
            assert torch.equal(one.read(name, (...,)), other.read(name, (...,))), name


@pytest.mark.swept(lambda p: p["name"] not in ("pythia-14m", "Llama-3-8B", "Phi-3-mini-4k-instruct"))
@pytest.mark.parametrize(
    ("name", "sizes"), [(name, MESHES[i % 3]) for i, name in enumerate(FAMILIES)], ids=lambda each: str(each)
)
def test_every_family_of_litgpt(pool, tmp_path, name, sizes) -> None:
    """As litgpt's model the hub's directory has the logits of Transformers', and it comes out as it came in."""
    whole = download(name, tmp_path, max_shard_size="50KB")
    logits = pool(sizes[0] * sizes[1])(litgpt_round_trip, name, sizes, tmp_path)
    with torch.no_grad():
        expected = whole(TOKENS).logits
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
    assert_same(tmp_path / "again", tmp_path)


def transformers_round_trip(model_type: str, sizes: tuple[int, int], directory: Path) -> None:
    whole = small_causal(model_type)
    options = {"replicate_attention": model_type in ("jamba", "nemotron_h")}
    model = fabric_tp.auto(**options)(changed(small_causal(model_type)), mesh(*sizes))
    huggingface.load(model, directory, progress=False)
    expected = whole.state_dict()
    for name, tensors in fabric_tp.checkpoint.parts.whole_tensors(model).items():
        assert torch.equal(tensors.gather(), expected[name]), name
    huggingface.save(model, directory / "again", max_shard_size="30KB")


@pytest.mark.swept(lambda p: p["model_type"] not in TYPES[1:2])
@pytest.mark.parametrize(("model_type", "sizes"), [(each, MESHES[i % 3]) for i, each in enumerate(TYPES)], ids=str)
def test_transformers(pool, tmp_path, model_type, sizes) -> None:
    import transformers

    whole = small_causal(model_type)
    whole.save_pretrained(tmp_path, max_shard_size="50KB")
    pool(sizes[0] * sizes[1])(transformers_round_trip, model_type, sizes, tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def bytes_read(directory: Path, sizes: tuple[int, int]) -> tuple[int, int]:
    """What all ranks of a mesh read, and what they keep."""
    model = fabric_tp.auto()(changed(transformers_model("Llama-3-8B")), mesh(*sizes))
    count: Counter[str] = Counter()
    read = Files.read

    def counting(self: Files, *args: object) -> Tensor:
        part = read(self, *args)  # type: ignore[arg-type]
        count["read"] += part.numel() * part.element_size()
        return part

    with mock.patch.object(Files, "read", counting):
        huggingface.load(model, directory)
    kept = sum(p._local_tensor.nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters())
    both = torch.tensor([count["read"], kept])
    dist.all_reduce(both)
    return int(both[0]), int(both[1])


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_ranks_read_what_they_keep(pool, tmp_path, sizes) -> None:
    download("Llama-3-8B", tmp_path)
    read, kept = pool(sizes[0] * sizes[1])(bytes_read, tmp_path, sizes)
    assert read == kept


def test_a_bf16_checkpoint_as_bin_files(tmp_path) -> None:
    whole = transformers_model("Llama-3-8B").bfloat16()
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    model = changed(GPT(config_of("Llama-3-8B")).bfloat16())
    huggingface.load(model, tmp_path)
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)


ADJUSTED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMAS = ("Llama-3-8B", "Llama-3.1-8B", "LLaMA-2-7B-32K", "Mistral-7B-v0.3", "SmolLM2-135M", "open_llama_3b")


@pytest.mark.parametrize("name", LLAMAS)
def test_a_llama_needs_no_config_of_another_directory(tmp_path, name) -> None:
    """Rotary tables that are stretched, heads of a size of their own; more tokens than Llama 3.1's was made for."""
    import transformers

    scaling = {"rope_adjustments": {**ADJUSTED, "original_max_seq_len": 16}} if name == "Llama-3.1-8B" else {}
    torch.manual_seed(0)
    model = GPT(small_config(name, head_size=16, block_size=128, **scaling))
    huggingface.save(model, tmp_path / "hub")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(90, (2, 100))
    with torch.no_grad():
        expected, logits = model(tokens), again(tokens).logits
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["pythia-14m", "Mixtral-8x7B-v0.1", "Qwen2.5-0.5B", "Mistral-7B-v0.1", "Gemma-2b"])
def test_others_do(tmp_path, name) -> None:
    model = GPT(small_config(name))
    with pytest.raises(ValueError, match=r"like=None must be a directory with a config.json"):
        huggingface.save(model, tmp_path / "again")
    huggingface.save_config(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_config_of_another_directory_stays(tmp_path) -> None:
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "config.json").write_text('{"of": "another"}')
    huggingface.save(GPT(small_config("Llama-3-8B")), tmp_path / "hub", like=tmp_path / "like")
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["of"] == "another"


def test_a_head_that_is_no_longer_the_embedding_is_written(tmp_path) -> None:
    download("Gemma-2b", tmp_path)
    model = GPT(config_of("Gemma-2b"))
    huggingface.load(model, tmp_path)
    huggingface.save(model, tmp_path / "same", like=tmp_path)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    huggingface.save(model, tmp_path / "other", like=tmp_path)
    import transformers

    for name, tied in {"same": True, "other": False}.items():
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is tied
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(again.lm_head.weight, again.model.embed_tokens.weight) is tied
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def replace_tensor(directory: Path, name: str, tensor: Tensor | None) -> None:
    state = load_file(directory / "model.safetensors")
    state.pop(name, None)
    save_file(state if tensor is None else state | {name: tensor}, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.weight", None, r"lacks 1 keys, such as \['transformer.ln_f.weight'\]"),
        ("model.layers.0.extra.weight", torch.ones(3), r"'model.layers.{}.extra.weight' is no tensor of Llama-3-8B"),
        ("model.norm.weight", torch.ones(3), r"transformer.ln_f.weight has the shape \(3,\)"),
        (
            "model.layers.2.input_layernorm.weight",
            torch.ones(3),
            r"1 that the model does not, such as \['transformer.h",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, name, tensor, message) -> None:
    download("Llama-3-8B", tmp_path)
    replace_tensor(tmp_path, name, tensor)
    model = GPT(config_of("Llama-3-8B"))
    before = model.lm_head.weight.clone()
    with pytest.raises(ValueError, match=message):
        huggingface.load(model, tmp_path)
    assert torch.equal(model.lm_head.weight, before)


def test_directories_without_a_checkpoint(tmp_path) -> None:
    model = GPT(config_of("Llama-3-8B"))
    with pytest.raises(ValueError, match="holds no checkpoint"):
        huggingface.load(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(ValueError, match=r"names \['model-00001-of-00002.safetensors'\], which are not there"):
        huggingface.load(model, tmp_path)


def fail_to_write(directory: Path) -> list[str]:
    """On a rank: the second one's disk is full; all hear of it."""
    model = fabric_tp.litgpt()(GPT(config_of("Llama-3-8B")), mesh(1, 2))
    failing = mock.Mock(side_effect=OSError("No space left on device"))
    with mock.patch.object(writing, "save_file", failing if dist.get_rank() else writing.save_file):
        try:
            huggingface.save(model, directory / "hub", like=directory, max_shard_size="30KB")
            message = ""
        except RuntimeError as error:
            message = str(error)
    messages = [""] * 2
    dist.all_gather_object(messages, message)
    return messages


def test_an_error_on_one_rank_ends_all_and_leaves_what_was(pool, tmp_path) -> None:
    download("Llama-3-8B", tmp_path)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").write_bytes(b"older")
    messages = pool(2)(fail_to_write, tmp_path)
    assert all("rank 1: OSError: No space left on device" in message for message in messages)
    assert (tmp_path / "hub" / "model.safetensors").read_bytes() == b"older"


def saved_over(directory: Path) -> None:
    model = fabric_tp.litgpt()(GPT(config_of("Llama-3-8B")), mesh(1, 2))
    huggingface.save(model, directory / "hub", like=directory, max_shard_size="30KB")
    huggingface.save(model, directory / "hub", like=directory)


def test_the_files_of_an_older_save_go_and_what_is_not_one_stays(pool, tmp_path) -> None:
    download("Llama-3-8B", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "notes.txt").write_text("mine")
    pool(2)(saved_over, tmp_path)
    files = {path.name for path in (tmp_path / "hub").iterdir()}
    assert files == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "notes.txt"}


def test_a_wrong_table_would_be_noticed(tmp_path) -> None:
    """Queries, keys and values that take turns head by head, read as if they did not."""
    from fabric_tp.architectures.litgpt import hub

    whole = download("pythia-14m", tmp_path)
    model = GPT(config_of("pythia-14m"))
    with mock.patch.object(hub.from_hub, "qkv_reassemble", lambda param, config: param):
        huggingface.load(model, tmp_path)
    with torch.no_grad():
        expected = whole(TOKENS).logits
        assert (model(TOKENS) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.sweep
def test_all_of_transformers_types(tmp_path) -> None:
    """From the meta device to the values of the checkpoint, and to the same output; without ranks."""
    read = []
    for model_type in causal_types():
        try:
            whole = small_causal(model_type).eval()
        except Exception:
            continue  # Transformers cannot make it small
        if model_type in ("apertus", "falcon_h1", "recurrent_gemma"):
            continue  # what initialises it fails, or leaves out a buffer
        whole.save_pretrained(tmp_path / model_type)
        with torch.device("meta"):
            model = type(whole)(whole.config).eval()
        initialize(model, torch.device("cpu"), seed=0)
        huggingface.load(model, tmp_path / model_type)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), (model_type, name)
        inputs = small_inputs(whole, TOKENS)
        with torch.no_grad():
            outputs = [each(**inputs) if isinstance(inputs, dict) else each(inputs) for each in (model, whole)]
        assert torch.equal(*map(first_tensor, outputs)), model_type
        read.append(model_type)
    assert len(read) > 140
