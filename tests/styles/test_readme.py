"""The styles' README shows what the docstrings say and what the command prints."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import fabric_tp
from fabric_tp import cli, styles
from fabric_tp.styles import Style
from tests.styles.table import MEASURED, Row, rows

FOLDER = Path(fabric_tp.__file__).parent
README = FOLDER.joinpath("styles/README.md").read_text()


def line(style: type[Style]) -> str:
    """The row for sequence parallelism of a style's table, or else its first."""
    row = next((each for each in rows(style) if '``"sequence"``' in each.values()), rows(style)[0])
    arguments = [name for name in inspect.signature(style).parameters if name in row]
    held = [name for name in row if name not in (*MEASURED, *arguments)]
    cells = [f"`{style.__name__}`", row["x"], row.get("inside", ""), parameters(row, held)]
    cells += [row.get(name, "") for name in ("y", "forward", "backward", "gradient")]
    return re.sub(" +", " ", f"| {' | '.join(cells)} |")


def parameters(row: Row, names: list[str]) -> str:
    return row[names[0]] if names == ["weight"] else ", ".join(f"{name} {row[name]}" for name in names)


def test_shapes() -> None:
    """A line for each style, in an order that the README chooses."""
    _, _, table = README.partition("| style | x |")
    shown = [each for each in table.split("\n\n")[0].splitlines() if each.startswith("| `")]
    known = [each for each in vars(styles).values() if inspect.isclass(each) and issubclass(each, Style)]
    assert sorted(shown) == sorted(line(style) for style in known if style is not Style)


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    cli.explain("Llama-3-8B", tensor_parallel_size=8)
    assert capsys.readouterr().out.strip("\n") == README.partition("```text\n")[2].partition("\n```")[0]


def test_files_are_there() -> None:
    files = re.findall(r"`([a-z_/]+(?:\.py|/))`", README)
    assert len(files) > 10
    assert [name for name in files if not (FOLDER / name).exists()] == []
    assert all((FOLDER / "styles" / link).exists() for link in re.findall(r"\]\(([^)#]+)\)", README))
