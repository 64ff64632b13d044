"""The recipe that lets a checkpoint answer, by the command that it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generate import check, decoded
from litgpt import Tokenizer

from tests.programs import RECIPES, fabric_run, finish, python, start


def said(launcher: list[str], final: Path, output: Path, *more: str) -> str:
    """What it prints after Fabric's own lines."""
    command = [*launcher, str(RECIPES / "generate.py"), str(final), "--seed", "3", "--max_new_tokens", "24", *more]
    return finish([start(command, output)]).rpartition("-" * 100 + "\n")[2].strip()


def answer(*command: Any) -> str:
    text, speed = said(*command, "--prompt", "def ").rsplit("\n", 1)
    assert speed.startswith("24 tokens, ")
    return text


def test_answers_are_those_of_one_process(run_1x1: Path, tmp_path: Path) -> None:
    one = answer(python(), run_1x1 / "final", tmp_path / "one")
    two = answer(fabric_run(2), run_1x1 / "final", tmp_path / "two")
    assert len(one.split()) > 3
    assert one == two


def test_a_chat_ends_with_its_input(run_1x1: Path, tmp_path: Path) -> None:
    assert "An empty one ends the chat." in said(python(), run_1x1 / "final", tmp_path / "output")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("lit_model.pth", "holds no checkpoint"),
        ("model_config.yaml", "has no model_config.yaml, and"),
        ("tokenizer.json", "holds neither tokenizer.json nor tokenizer.model"),
    ],
)
def test_a_directory_that_is_no_checkpoint(run_1x1: Path, tmp_path: Path, missing: str, message: str) -> None:
    for path in (run_1x1 / "final").iterdir():
        if path.name != missing:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=message):
        check(tmp_path)


def test_characters_of_several_tokens_are_printed_whole(run_1x1: Path) -> None:
    tokenizer = Tokenizer(run_1x1 / "final")
    text = "naïve 日本 🦙 def"
    tokens = tokenizer.encode(text).tolist()
    pieces = list(decoded(tokenizer, iter(tokens)))
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text
    assert "" in pieces
