"""The tables in the styles' docstrings: read, and compared with what a module on two ranks is and does.

A column is an argument of the style, or ``x``, ``inside``, ``y``, ``forward``, ``backward``, ``gradient``, or else the
name of a parameter. Shapes are those of one rank: ``(b, s/t, h)``; a partial sum says so: ``(b, s, h) partial``.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import parallelize_module

from fabric_tp.measure.communication import CollectiveCounter
from fabric_tp.styles import Style
from fabric_tp.styles.fused_colwise import FusedModule, fused_parameters
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import randomize

SIZES = {"t": 2, "b": 5, "s": 16, "h": 22, "f": 12, "v": 14, "n": 20, "d": 4, "k": 3, "r": 9}
"""No two are alike, nor are their halves."""

MEASURED = ("x", "inside", "y", "forward", "backward", "gradient")
"""Columns that are neither arguments nor parameters."""

Row = Mapping[str, str]
Part = Callable[[Tensor, int], Tensor]
"""Of a whole tensor, what a rank has."""


def rows(documented: Any) -> list[Row]:
    """The rows of the table in a docstring: cells by the name of the column."""
    lines = inspect.cleandoc(documented.__doc__).splitlines()
    top, below, bottom = (number for number, line in enumerate(lines) if re.fullmatch(r"=+( +=+)+", line))
    starts = [match.start() for match in re.finditer("=+", lines[top])]

    def cells(line: str) -> list[str]:
        return [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]

    found: list[dict[str, str]] = []
    for line in lines[below + 1 : bottom]:
        row = dict(zip(cells(lines[top + 1]), cells(line), strict=True))
        if line.startswith(" "):  # the row before goes on
            found[-1] = {name: f"{found[-1][name]} {cell}".strip() for name, cell in row.items()}
        else:
            found.append(row)
    return found


def name_of(row: Row) -> str:
    """The arguments among the cells, for the name of a test."""
    return ", ".join(cell.strip("`") for cell in row.values() if cell.startswith("``")) or "always"


def normal(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Example:
    """A small module for a style, and what the style's table leaves open."""

    style: type[Style]
    build: Callable[[], nn.Module]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the style, other than those in the table."""
    names: Mapping[str, Any] = field(default_factory=dict)
    """What names among the table's arguments mean, other than sizes."""
    inner: Mapping[str, Style] = field(default_factory=dict)
    """Styles of modules inside."""
    cells: Row = field(default_factory=dict)
    """Columns that the table does not have."""
    make_x: Callable[[tuple[int, ...]], Tensor] = normal
    x_part: Part | None = None
    y_part: Part | None = None
    """Where a rank's part is not a slice of the whole."""
    reference: Callable[[], nn.Module] | None = None
    """The same on one device, if it is not the module itself."""
    after: Callable[[nn.Module], object] | None = None
    """To do with the parallelized module."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Other than ``SIZES``."""

    def style_of(self, row: Row) -> Style:
        names = {**SIZES, **self.sizes, **self.names}
        listed = [name for name in inspect.signature(self.style).parameters if name in row]
        return self.style(**self.arguments, **{name: eval(row[name].strip("`"), names) for name in listed})


def check(example: Example, row: Row, by_keyword: bool = False) -> None:
    """On every rank: the row is what is measured, and output and gradients equal one device.

    Args:
        example: The module.
        row: Of the table.
        by_keyword: Give the input by the name that the module has for it.
    """
    row, sizes = {**example.cells, **row}, {**SIZES, **example.sizes}
    style, size, rank = example.style_of(row), sizes["t"], dist.get_rank()
    original, reference, model = build(example, style, size)
    check_contract(style, original["it"], model["it"], example.inner)
    x_part, y_part = part_of(row["x"], size, example.x_part), part_of(row["y"], size, example.y_part)

    whole_x = seeded(lambda: example.make_x(shape_of(row["x"].replace("/t", ""), sizes)))
    x = (x_part(whole_x, rank) if x_part else whole_x).clone()
    for each in (whole_x, x):
        each.requires_grad_(each.is_floating_point())
    whole_y = reference["it"](whole_x)
    y_grads = [seeded(lambda: normal(whole_y.shape))]
    if y_part:
        y_grads = [seeded(lambda r=r: normal(y_part(whole_y, r).shape), seed=r) for r in range(size)]
    whole_y.backward(sum(adjoint(y_part, whole_y, grad, r) for r, grad in enumerate(y_grads)))
    y, counter = run(model["it"], x, y_grads[rank % len(y_grads)], by_keyword)

    measured = {"x": str(tuple(x.shape)), "y": str(tuple(y.shape))}
    measured["y"] += " partial" if is_partial(y, whole_y, y_part, size) else ""
    partial_grads = ["x"] if x.grad is not None and is_partial(x.grad, whole_x.grad, x_part, size) else []
    partial_grads += partial_parameters(style, original["it"], reference, model, size)
    measured["gradient"] = f"partial: {', '.join(partial_grads)}" if partial_grads else ""
    for phase, said in zip(("forward", "backward"), style.collectives(), strict=True):
        issued = [each for each in counter.collectives if each.phase == phase]
        assert sorted(each.kind for each in issued) == sorted(re.findall("all-[a-z]+|reduce-scatter", said))
        sized = "(" in row[phase]
        measured[phase] = ", ".join(each.kind + (f" of {each.nbytes // 8}" if sized else "") for each in issued)
    for name in row.keys() - measured.keys() - inspect.signature(type(style)).parameters.keys():
        measured[name] = str(seen_inside(model["it"]) if name == "inside" else local_shape(model["it"], name))
    assert measured == {"gradient": "", **documented(row, sizes)}


def run(module: nn.Module, x: Tensor, y_grad: Tensor, by_keyword: bool) -> tuple[Tensor, CollectiveCounter]:
    """This rank's output, and what a forward and a backward issued."""
    name = module.parallelized.first_argument
    with CollectiveCounter(mesh(1, dist.get_world_size())) as counter:
        counter.phase = "forward"
        y = module(**{name: x}) if by_keyword else module(x)
        counter.phase = "backward"
        local = y.to_local() if isinstance(y, DTensor) else y
        local.backward(y_grad)
    return local, counter


def documented(row: Row, sizes: Mapping[str, int]) -> dict[str, str]:
    """The row without the style's arguments, in numbers."""

    def shape(match: re.Match[str]) -> str:
        return str(shape_of(match[0], sizes))

    def elements(match: re.Match[str]) -> str:
        return f"of {math.prod(shape_of(match[0], sizes))}"

    return {
        name: re.sub(r"\([^)]*\)", elements if name in ("forward", "backward") else shape, cell)
        for name, cell in row.items()
        if not cell.startswith("``")
    }


def shape_of(cell: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return eval(cell.replace("/", "//"), dict(sizes))


def part_of(cell: str, size: int, custom: Part | None) -> Part | None:
    """None: each rank has the whole."""
    sharded = [dim for dim, term in enumerate(cell.split(",")) if "/t" in term]
    if custom or not sharded:
        return custom
    (dim,) = sharded
    return lambda whole, rank: whole.chunk(size, dim)[rank]


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def build(example: Example, style: Style, size: int) -> tuple[nn.ModuleDict, nn.ModuleDict, nn.ModuleDict]:
    """The module, its reference, and the module parallelized, each as ``it`` of another."""
    original = nn.ModuleDict({"it": randomize(seeded(example.build)).double()})
    model = copy.deepcopy(original)
    plan = {"it": style, **{f"it.{name}": inner for name, inner in example.inner.items()}}
    parallelize_module(model, mesh(1, size)["tensor_parallel"], plan)
    if example.after:
        example.after(model)
    return original, nn.ModuleDict({"it": example.reference()}) if example.reference else original, model


def check_contract(style: Style, original: nn.Module, module: nn.Module, inner: Mapping[str, Style]) -> None:
    """What all styles say of their parameters means the same."""

    def own(named: nn.Module) -> dict[str, nn.Parameter]:
        return {n: p for n, p in named.named_parameters() if not any(n.startswith(f"{each}.") for each in inner)}

    places, shapes = style.placements(original), style.shapes(original)
    assert own(module).keys() == places.keys() == shapes.keys()
    assert style.covers(original) == own(original).keys()
    assert style.partial(original) <= places.keys()
    for name, parameter in own(module).items():
        assert isinstance(parameter, DTensor)
        assert parameter.placements == (places[name],)
        assert parameter.shape == shapes[name]


def adjoint(part: Part | None, whole: Tensor, local: Tensor, rank: int) -> Tensor:
    """A rank's part in its place in the whole, with zeros around."""
    if part is None:
        return local
    leaf = torch.zeros_like(whole).requires_grad_()
    (grad,) = torch.autograd.grad(part(leaf, rank), leaf, local)
    return grad


def is_partial(local: Tensor, whole: Tensor, part: Part | None, size: int) -> bool:
    """Whether ranks have terms of a sum, and not parts of the whole. One of both must be so."""
    every = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(every, local.detach().contiguous())
    if all(same(each, part(whole, rank) if part else whole) for rank, each in enumerate(every)):
        return False
    total = sum(adjoint(part, whole.detach(), each, rank) for rank, each in enumerate(every))
    assert same(total, whole), f"off by {(total - whole).abs().max()}"
    return True


def same(one: Tensor, other: Tensor) -> bool:
    assert one.shape == other.shape
    return torch.allclose(one, other, rtol=0, atol=1e-10)


def partial_parameters(
    style: Style, original: nn.Module, reference: nn.Module, model: nn.ModuleDict, size: int
) -> list[str]:
    """Those of the style, after the gradients of all parameters inside were compared."""
    fused, used, partial = fused_parameters(model), dict[str, int](), []
    for name, parameter in model.named_parameters():
        whole, dim = fused.get(name, (name, 0))
        expected, start = reference.get_parameter(whole).grad, used.get(whole, 0)
        if name in fused:
            used[whole] = start + parameter.shape[dim]
            expected = expected.narrow(dim, start, parameter.shape[dim])
        (placement,) = parameter.placements
        part = part_of(f"{'-,' * placement.dim}/t", size, None) if isinstance(placement, Shard) else None
        if is_partial(parameter.grad.to_local(), expected, part, size):
            assert parameter.grad.placements == (Partial(),), name
            partial.append(name.removeprefix("it."))
        else:
            assert parameter.grad.placements == parameter.placements, name
    own = [name for name in style.placements(original) if name in partial]
    assert frozenset(own) == model["it"].parallelized.partial
    return own


def local_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """Of a parameter, on this rank; if it is held in parts, of these together."""
    fused = isinstance(module, FusedModule) and name in module.fused_names()
    parts = [module.get_parameter(each).to_local() for each in (module.part_names(name) if fused else [name])]
    return tuple(torch.cat(parts, module.parallelized.style.fused_dim(module, name) if fused else 0).shape)


def seen_inside(module: nn.Module) -> tuple[int, ...]:
    (seen,) = (each.seen for each in module.modules() if hasattr(each, "seen"))
    return seen
