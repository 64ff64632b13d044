"""What docstrings and pages refer to exists, in internal modules as well, of which the API reference shows nothing."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import fabric_tp

ROOT = Path(__file__).parents[1]
MODULES = [path for path in ROOT.glob("fabric_tp/**/*.py") if path.name != "__main__.py"]
PAGES = [  # the changelog may name what was
    ROOT / "README.md",
    *(page for folder in (".github", "benchmarks", "docs", "fabric_tp") for page in ROOT.glob(f"{folder}/**/*.md")),
    *ROOT.glob("docs/**/*.rst"),
]

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?\.?([\w.]+)`")
NAME = re.compile(r"\bfabric_tp(?:\.[A-Za-z_]\w*)+(?![\w/])")
PATH = re.compile(r"(?<![\w./-])(?:fabric_tp|tests|benchmarks|recipes|docs)/[\w./-]*\w")


def exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def namespaces(module: ModuleType) -> list[object]:
    """Where a short name in a docstring of the module may be: there, in its package, or in a class that it knows."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__.startswith("fabric_tp")]
    return [module, importlib.import_module(module.__name__.rpartition(".")[0] or module.__name__), *classes]


def knows(namespace: object, name: str) -> bool:
    first, _, rest = name.partition(".")
    if not hasattr(namespace, first):
        return name in getattr(namespace, "__annotations__", {})  # a field without a default
    return not rest or knows(getattr(namespace, first), rest)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_docstrings_refer_to_what_is_there(path) -> None:
    module = importlib.import_module(relative(path.with_suffix("")).replace("/", ".").removesuffix(".__init__"))
    for target in ROLE.findall(inspect.getsource(module)):
        if target.startswith("fabric_tp"):
            assert exists(target), target
        else:
            assert any(knows(namespace, target) for namespace in namespaces(module)), target


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_name_what_is_there(page) -> None:
    text = page.read_text()
    assert [name for name in NAME.findall(text) if not exists(name)] == []
    assert [path for path in PATH.findall(text) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=relative)
def test_no_section_of_a_page_is_there_twice(page) -> None:
    headings = re.findall(r"^#+ .*", page.read_text(), re.MULTILINE)
    assert sorted(set(headings)) == sorted(headings)


def test_every_public_namespace_has_a_page() -> None:
    public = {name for name in fabric_tp.__all__ if inspect.ismodule(getattr(fabric_tp, name))}
    pages = {page.stem for page in ROOT.glob("docs/reference/*.rst")}
    assert {"fabric_tp", "fabric_tp.architectures", *(f"fabric_tp.{name}" for name in public)} <= pages
    listed = ROOT.joinpath("docs/index.rst").read_text()
    assert all(f"reference/{page}\n" in listed for page in pages)


@pytest.mark.parametrize("target", ["fabric_tp.cross_entropies", "cross_entropies", "Inputs.sets_up"])
def test_a_broken_reference_is_noticed(target) -> None:
    import fabric_tp.data.inputs as module

    assert not exists(target)
    assert not any(knows(namespace, target) for namespace in namespaces(module))
