"""The page on adding an architecture: its example runs, and the errors that it explains are the errors one meets."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import fabric_tp
from fabric_tp import architectures
from fabric_tp.testing.parity import compare, next_token_loss
from tests.models import LENGTH
from tests.programs import finish, python, start

PAGE = Path(architectures.__file__).with_name("README.md")


def example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return block


@pytest.fixture
def parrot(tmp_path) -> Any:
    path = tmp_path / "parrot.py"
    path.write_text(example())
    spec = importlib.util.spec_from_file_location("parrot", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(parrot: ModuleType, **attention: Any) -> None:
    block = parrot.PARROT.block
    changed = replace(parrot.PARROT, block=replace(block, attention=replace(block.attention, **attention)))
    fabric_tp.Parallelize(architecture=changed).check(parrot.Parrot(), tensor_parallel_size=2)


@pytest.mark.sweep
def test_example_runs(tmp_path) -> None:
    (script := tmp_path / "parrot.py").write_text(example())
    printed = finish([start([*python(), str(script)], tmp_path / "output")])
    assert "trunk.*.attention.to_k x 2" in printed
    assert re.search(r"^equal to one device: of \d+ tensors", printed, re.MULTILINE)


def test_auto_does_not_know_it(parrot) -> None:
    with pytest.raises(ValueError, match="The architecture of this Parrot is not known"):
        fabric_tp.auto().check(parrot.Parrot(), tensor_parallel_size=2)


def test_names_that_are_not_there(parrot) -> None:
    with pytest.raises(ValueError, match="The model is a Parrot and not a Parrot"):
        refused(parrot, outputs=("to_nothing",))


def test_a_layer_that_is_missing(parrot) -> None:
    with pytest.raises(ValueError, match=r"No style of the plan covers the parameters trunk\.0\.attention\.to_v\.bias"):
        refused(parrot, keys_values=("to_k",))


def test_sizes_that_cannot_be_divided(parrot) -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3 does not divide weight\.shape\[0\]="):
        fabric_tp.Parallelize(architecture=parrot.PARROT).check(parrot.Parrot(), tensor_parallel_size=3)


def forget_counts(path: str) -> None:
    """On a rank, which imports the page's example itself."""
    import torch

    namespace: dict[str, Any] = {"__name__": "parrot"}
    exec(compile(Path(path).read_text(), path, "exec"), namespace)
    described = namespace["PARROT"]
    attention = replace(described.block.attention, query_counts=())
    changed = replace(described, block=replace(described.block, attention=attention))
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    build: Any = namespace["build"]
    assert isinstance(build(), nn.Module)
    with pytest.raises(ValueError, match=r"cannot run on one of 2 ranks: shape '\[.*\]' is invalid for input of size"):
        compare(build, fabric_tp.Parallelize(architecture=changed), tokens, next_token_loss, (1, 2), 1)


def test_counts_that_are_missing(pool, tmp_path) -> None:
    (tmp_path / "parrot.py").write_text(example())
    pool(2)(forget_counts, str(tmp_path / "parrot.py"))


@pytest.mark.parametrize("error", ["No style of the plan covers", "does not divide", "is invalid for input"])
def test_page_explains(error) -> None:
    assert error in PAGE.read_text()


def test_page_names_real_fields() -> None:
    text = PAGE.read_text()
    described = (
        architectures.Architecture,
        architectures.Attention,
        architectures.Block,
        architectures.FeedForward,
    )
    fields = {name for cls in described for name in cls.__dataclass_fields__}
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \|", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    assert named
    assert named <= fields
