"""The rules by which the package's folders import each other, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import fabric_tp
from fabric_tp.architectures import KNOWN

PACKAGE = Path(fabric_tp.__file__).parent
GROUND = ("_torch", "mesh", "seeds", "shards", "wrapping")
ROOMS = (
    "architectures",
    "autograd",
    "loss",
    "styles",
    "plan",
    "random",
    "parallelize",
    "generation",
    "checkpoint",
    "data",
    "strategy",
    "measure",
    "testing",
)
"""From the ground up: a folder imports from those before it only. The ground's files import nothing but each other."""

LEAN = ("architectures.lean", "architectures.litgpt.lean")
"""What descriptions name as text, and nothing in architectures imports: it computes."""

NO_DESCRIPTIONS = ("lean", "small", "config", "memory", "flops", "cache", "hub", "llama_config")
"""Other files in architectures."""

LIBRARIES = ("litgpt", "transformers")
COLLECTIVES = (
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "start_all_gather",
    "start_differentiable_all_gather",
    "start_reduce_scatter",
    "start_all_reduce",
)
PAIRS = ("copy", "reduce", "gather", "traceable_gather", "reduce_scatter", "gather_replicated", "scatter", "all_reduce")


def sources() -> dict[str, str]:
    """The package's modules, by their names within it."""
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name: path.read_text() for name, path in sorted(files.items())}


def imports(source: str) -> Iterator[tuple[str, str]]:
    """Module and name of each import, within functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def within(source: str) -> set[str]:
    """Full names, within the package, of all that is imported from it."""
    found = {f"{module}.{name}" if name else module for module, name in imports(source)}
    return {name.removeprefix("fabric_tp.") for name in found if name.startswith("fabric_tp.")}


def room(name: str) -> str:
    return name.split(".")[0]


def imports_upwards(modules: dict[str, str]) -> list[str]:
    wrong = []
    for name, source in modules.items():
        own = room(name)
        if own not in (*ROOMS, *GROUND):
            continue  # the face of the package: it may import all
        below = (*GROUND, *ROOMS[: ROOMS.index(own)]) if own in ROOMS else GROUND
        if name in LEAN:
            below = (*below, "autograd")
        wrong += [f"{name} imports {each}" for each in within(source) if room(each) not in (own, *below)]
    return wrong


def imports_libraries(modules: dict[str, str]) -> list[str]:
    """Modules outside of architectures that import what models are made of, other than for their annotations."""
    wrong = []
    for name, source in modules.items():
        if room(name) != "architectures":
            at_run_time = ast.unparse(_without_type_checking(ast.parse(source)))
            wrong += [name for module, _ in imports(at_run_time) if module.split(".")[0] in LIBRARIES]
    return wrong


def _without_type_checking(tree: ast.Module) -> ast.Module:
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    return tree


def model_names() -> set[str]:
    """Names of modules in the families' descriptions, that are no words of the field."""

    def strings(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield from value.split(".")
        elif isinstance(value, (tuple, list)):
            for each in value:
                yield from strings(each)
        elif isinstance(value, dict):
            yield from strings(tuple(value))
        elif is_dataclass(value):
            for field in fields(value):
                if field.name not in ("description", "lean", "adapter_bases", "tested"):
                    yield from strings(getattr(value, field.name))

    words = {"", "norm", "output", "layers", "model", "attention", "mlp", "gate", "experts", "dropout", "config"}
    words |= {"router", "blocks", "head", "query", "key", "value", "dim", "drop", "k", "0"}
    words |= {"dropout_p", "p"}  # torch's, of attention and of nn.Dropout
    words |= {each.name for each in KNOWN} | {
        "feed_forward",
        "proj",
        "h",
        "transformer",
        "eps",
        "layer_norm",
        "base_model",
        "lm_head",
    }
    return {name for architecture in KNOWN for name in strings(architecture)} - words


def mentions_model_names(modules: dict[str, str]) -> list[str]:
    known = model_names()
    wrong = []
    for name, source in modules.items():
        if room(name) == "architectures":
            continue
        for node in ast.walk(ast.parse(source)):
            text = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            if isinstance(text, str) and text in known:
                wrong.append(f"{name} line {getattr(node, 'lineno', '?')} mentions {text}")
    return wrong


def uses_collectives(modules: dict[str, str]) -> list[str]:
    """Modules other than those of autograd that issue a collective of forward and backward themselves, and modules
    other than those of styles and loss that call the differentiable ones."""
    wrong = []
    for name, source in modules.items():
        if name in OWN_COLLECTIVES:
            continue
        raw = [
            node.attr
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "_torch"
        ]
        if room(name) not in ("autograd",):
            wrong += [f"{name} issues {each}" for each in raw if each in COLLECTIVES]
        if room(name) not in ("autograd", "styles", "loss"):
            names = [each for module, each in imports(source) if module == "fabric_tp.autograd.collectives"]
            wrong += [f"{name} calls {each}" for each in names if each in PAIRS]
    return wrong


OWN_COLLECTIVES = {
    "shards": "gathers whole parameters, for checkpoints",
    "generation.sampling": "gathers logits of one token; there is no backward",
}
"""What is no part of a training step's forward and backward."""


def describes_with_code(modules: dict[str, str]) -> list[str]:
    """Descriptions that import what computes."""
    wrong = []
    for name, source in modules.items():
        if room(name) == "architectures" and name.rpartition(".")[2] not in NO_DESCRIPTIONS:
            inside = [each for each in within(source) if room(each) != "architectures" or each in LEAN]
            outside = [module for module, _ in imports(source) if module.split(".")[0] in (*LIBRARIES,)]
            wrong += [f"{name} imports {each}" for each in (*inside, *outside)]
    return wrong


RULES = {
    "no folder imports from one above it": (
        imports_upwards,
        {"autograd.wrong": "from fabric_tp.styles.style import Style", "seeds": "from fabric_tp import data"},
    ),
    "only architectures imports what models are made of": (
        imports_libraries,
        {"measure.wrong": "def f():\n    from litgpt import GPT"},
    ),
    "only architectures knows names of models": (
        mentions_model_names,
        {"plan.wrong": "name = 'qkv'", "measure.wrong": "x = model.q_proj"},
    ),
    "collectives are defined in autograd and called by styles and loss": (
        uses_collectives,
        {
            "styles.wrong": "from fabric_tp import _torch\n_torch.all_reduce(x, name)",
            "parallelize.wrong": "from fabric_tp.autograd.collectives import gather",
        },
    ),
    "descriptions import no code that computes": (
        describes_with_code,
        {
            "architectures.wrong": "from fabric_tp.autograd.norms import rms_norm",
            "architectures.litgpt.description": "from litgpt import GPT",
        },
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_holds(rule) -> None:
    broken_by, _ = RULES[rule]
    assert broken_by(sources()) == []


@pytest.mark.parametrize(("rule", "module"), [(rule, module) for rule, (_, wrong) in RULES.items() for module in wrong])
def test_notices_what_breaks_it(rule, module) -> None:
    broken_by, wrong = RULES[rule]
    assert any(each.startswith(module) for each in broken_by({module: wrong[module]}))


def test_every_folder_is_on_the_map() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert folders == set(ROOMS)
    assert all(f"``{name}/``" in (fabric_tp.__doc__ or "") for name in folders)
