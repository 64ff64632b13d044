from pathlib import Path

import pytest
import torch
from checkpoint_dir import check_checkpoint_dir
from finetune_arguments import FinetuneArgs, command_line, lora_options
from safetensors.torch import save_file


def test_checkpoint_directory_comes_first() -> None:
    assert command_line(["some/where", "--max_steps", "3"]).initial_checkpoint_dir == Path("some/where")
    assert command_line([]).initial_checkpoint_dir is None


def test_adapters_are_those_of_litgpt() -> None:
    assert lora_options(FinetuneArgs()) == {}
    assert lora_options(command_line(["--lora", "true", "--lora_r", "4", "--lora_head", "true"])) == {
        "lora_r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_query": True,
        "lora_key": False,
        "lora_value": True,
        "lora_projection": False,
        "lora_mlp": False,
        "lora_head": True,
    }


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--lora_r", "4"], r"--lora_r 4 says how to make adapters, and without --lora true none are"),
        (["--lora", "true", "--lora_r", "0"], r"--lora_r 0 must be at least 1"),
        (["--lora", "true", "--lora_dropout", "1"], r"--lora_dropout 1.0 must lie in \[0, 1\)"),
        (
            ["--lora", "true", "--lora_query", "false", "--lora_value", "false"],
            r"no layer is to get an adapter. These give one: --lora_query true, --lora_key true",
        ),
    ],
)
def test_adapters_that_do_not_work(given: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        lora_options(command_line(given))


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], r"holds no checkpoint: neither model.safetensors"),
        (["model_config.yaml"], r"holds no checkpoint: neither model.safetensors"),
        (["model.safetensors", "config.json"], r"has no model_config.yaml, and 'test_.*' is none of litgpt's names"),
    ],
)
def test_directories_that_do_not_work(tmp_path: Path, files: list[str], match: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    if "model.safetensors" in files:
        save_file({"one": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=match):
        check_checkpoint_dir(tmp_path)


@pytest.mark.parametrize("option", ["--model_name", "--initial_checkpoint_dir", "--tokenizer_dir"])
def test_the_model_is_the_checkpoints(option: str) -> None:
    with pytest.raises(SystemExit):
        command_line([option, "x"])
