"""What all styles have in common."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

import fabric_tp
from fabric_tp import styles
from fabric_tp.styles import Colwise, PrepareInput, ScatterInput, Style
from fabric_tp.testing.ranks import mesh
from tests.styles.table import Example, check, rows

FOLDER = Path(styles.__file__).parent
STYLES: dict[str, type[Style]] = {
    name: style
    for name, style in vars(styles).items()
    if inspect.isclass(style) and issubclass(style, Style) and style is not Style
}
EXAMPLES: dict[str, Example] = {
    name: importlib.import_module(f"tests.styles.test_{style.__module__.rpartition('.')[2]}").EXAMPLE
    for name, style in STYLES.items()
}
LAYOUTS = ("layout", "input_layout", "output_layout")


def test_every_style_is_public_and_has_an_example() -> None:
    defined = set()
    for path in FOLDER.glob("*.py"):
        module = importlib.import_module(
            f"fabric_tp.styles.{path.stem}" if path.stem != "__init__" else "fabric_tp.styles"
        )
        defined |= {name for name, each in vars(module).items() if inspect.isclass(each) and issubclass(each, Style)}
    assert defined - {"Style"} == STYLES.keys() == EXAMPLES.keys()
    assert {example.style for example in EXAMPLES.values()} == set(STYLES.values())


def test_every_file_has_a_test_of_its_name() -> None:
    tests = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    assert {f"test_{path.stem}" for path in FOLDER.glob("*.py") if path.stem != "__init__"} <= tests


# How a style is made


@pytest.mark.parametrize("name", STYLES)
def test_required_arguments_then_the_layout_then_names(name) -> None:
    parameters = list(inspect.signature(STYLES[name]).parameters.values())
    required = [each for each in parameters if each.default is each.empty]
    positional = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    layouts = [each for each in positional if each not in required]
    assert positional == parameters[: len(positional)] == required + layouts
    assert all(each.name in LAYOUTS for each in layouts)
    assert not any(each.name in LAYOUTS for each in parameters if each not in positional)
    assert all(each.kind is each.KEYWORD_ONLY for each in parameters[len(positional) :])


@pytest.mark.parametrize("name", STYLES)
def test_shows_its_arguments(name) -> None:
    """And is made again from what it shows."""
    for row in rows(STYLES[name]):
        style = EXAMPLES[name].style_of(row)
        again = eval(repr(style), dict(vars(styles)))
        assert type(again) is type(style)
        assert repr(again) == repr(style)
        assert vars(again).keys() == vars(style).keys()
        for argument in inspect.signature(STYLES[name]).parameters:
            assert repr(getattr(again, argument)) == repr(getattr(style, argument))


# What its docstring says


@pytest.mark.parametrize("name", STYLES)
def test_docstring_names_the_arguments(name) -> None:
    described = re.search(r"^Args:\n((?:    .*\n|\n)*)", inspect.getdoc(STYLES[name]), re.MULTILINE)
    names = re.findall(r"^    (\w+): ", described[1], re.MULTILINE) if described else []
    parameters = list(inspect.signature(STYLES[name]).parameters)
    assert names == (["heads"] if name == "RandomHeads" else parameters)


@pytest.mark.parametrize("name", [*STYLES, "Style"])
def test_example_of_the_docstring(name) -> None:
    _, _, block = inspect.getdoc(getattr(styles, name)).partition("Example::\n\n")
    names = {**vars(styles), "fabric_tp": fabric_tp}
    exec(inspect.cleandoc(block), names)
    assert all(isinstance(style, ParallelStyle) for style in names["plan"].values())
    assert any(type(style).__name__ == name for style in names["plan"].values()) or name == "Style"
    assert callable(fabric_tp.from_plan(names["plan"]))


# What a parallelized module does


@pytest.mark.parametrize("name", STYLES)
def test_first_argument_by_its_name(pool, name) -> None:
    pool(2)(check, EXAMPLES[name], rows(STYLES[name])[0], by_keyword=True)


class Arguments(nn.Module):
    """Says what it was given."""

    def forward(self, hidden: Tensor, mask: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return hidden, mask, scale


class OnlyNames(Arguments):
    def forward(self, *, hidden: Tensor, mask: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return hidden, mask, scale


class OnlyPlaces(Arguments):
    def forward(self, *tensors: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return (*tensors, scale)  # type: ignore[return-value]


def lengths(module: nn.Module, places: str, names: str) -> list[int]:
    """Of what the module sees of three arguments of 8 tokens."""
    given = {name: torch.zeros(1, 8) for name in ("hidden", "mask", "scale")}
    parallelized = ScatterInput()._apply(module, mesh(1, 2)["tensor_parallel"])
    args, kwargs = [given[name] for name in places.split()], {name: given[name] for name in names.split()}
    seen = parallelized(*args, **kwargs)
    assert kwargs.keys() == set(names.split())
    return [each.shape[1] for each in seen]


@pytest.mark.parametrize(
    ("module", "places", "names"),
    [
        (Arguments(), "hidden mask", "scale"),
        (Arguments(), "hidden", "scale mask"),
        (Arguments(), "", "hidden mask scale"),
        (Arguments(), "", "scale mask hidden"),
        (OnlyNames(), "", "scale hidden mask"),
        (OnlyPlaces(), "hidden mask", "scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_first_argument_is_the_first_of_the_signature(pool, module, places, names) -> None:
    """It is entered, and the others stay as they are, however they are given and in whatever order."""
    assert pool(2)(lengths, module, places, names) == [4, 8, 8]


def refuse_what_cannot_be_divided() -> None:
    message = r"tensor_parallel_size=2 does not divide weight.shape\[0\]=3, bias.shape\[0\]=3 of Linear\."
    with pytest.raises(ValueError, match=message):
        Colwise()._apply(nn.Linear(4, 3), mesh(1, 2)["tensor_parallel"])


def test_refuses_what_the_ranks_do_not_divide(pool) -> None:
    pool(2)(refuse_what_cannot_be_divided)


def parameters_of_a_call(fails: bool) -> None:
    """DTensors before and after the forward, plain tensors in it, also where it fails."""
    inside: list[Any] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            inside.extend([type(self.weight), self.weight.shape])
            if fails:
                raise RuntimeError("on purpose")
            return super().forward(x)

    module = Colwise()._apply(Watched(4, 6), mesh(1, 2)["tensor_parallel"])
    before = dict(module.named_parameters())
    try:
        module(torch.zeros(2, 3, 4))
    except RuntimeError:
        assert fails
    assert inside == [torch.Tensor, (3, 4)]
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert isinstance(module, Watched)
    assert type(module).__name__ == "LocalModule[Watched]"


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_plain_tensors_in_the_forward_alone(pool, fails) -> None:
    pool(2)(parameters_of_a_call, fails)


def test_a_style_of_ones_own() -> None:
    """Of arguments that it does not keep nothing is shown."""

    class Halved(PrepareInput):
        def __init__(self, factor: float) -> None:
            super().__init__()

    assert repr(Halved(0.5)) == "Halved()"
