"""fabric_tp.testing's comparison on the models of the tests, run on ranks that stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fabric_tp
from fabric_tp.testing import Report, next_token_loss
from fabric_tp.testing.parity import compare
from fabric_tp.testing.ranks import Ranks
from tests.models import LENGTH, VOCABULARY, build


def differences(
    name: str,
    factory: str,
    options: dict[str, Any],
    sizes: tuple[int, int],
    break_model: Callable[[nn.Module], None] | None = None,
) -> dict[str, float]:
    """Run on every rank of a mesh of these (data-parallel, tensor-parallel) sizes."""
    generator = torch.Generator().manual_seed(0)
    batch = 2 * sizes[0]
    inputs = torch.randint(VOCABULARY, (batch, LENGTH), generator=generator)
    loss: Callable[[Any, Any], Tensor] = next_token_loss
    if name == "feed_forward":
        inputs, loss = torch.randn(batch, LENGTH, 64, generator=generator), _regression
    parallelize_fn = getattr(fabric_tp, factory)(**options)
    return compare(partial(build, name), parallelize_fn, inputs, loss, sizes, 3, break_model)


def assert_parity(name: str, factory: str, options: dict[str, Any], sizes: tuple[int, int]) -> None:
    report = Report(differences(name, factory, options, sizes))
    assert report.equal, str(report)


PARTITIONED = "aot_eager_decomp_partition"
"""Compiles as torch's default backend does, up to where that generates code and has it compiled."""


def compiled_by(backend: str, function: Callable[..., Any], *args: Any) -> Any:
    """On a rank: what the function compiles is compiled so, and as if for the first time."""
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        return function(*args)


def differences_of(
    pool: Callable[[int], Ranks],
    build_model: Callable[[], nn.Module],
    parallelize_fn: fabric_tp.Parallelize,
    sizes: tuple[int, int] = (1, 2),
    *,
    inputs: Any = None,
    steps: int = 1,
    backend: str = "",
    break_model: Callable[[nn.Module], None] | None = None,
) -> dict[str, float]:
    """Of any model, called on the side of the tests."""
    tokens = torch.randint(VOCABULARY, (2 * sizes[0], LENGTH), generator=torch.Generator().manual_seed(0))
    run = partial(compiled_by, backend, compare) if backend else compare
    return pool(sizes[0] * sizes[1])(
        run,
        build_model,
        parallelize_fn,
        tokens if inputs is None else inputs,
        next_token_loss,
        sizes,
        steps,
        break_model,
    )


def assert_equal(*args: Any, **kwargs: Any) -> None:
    """The model of :func:`differences_of` equals one device."""
    report = Report(differences_of(*args, **kwargs))
    assert report.equal, str(report)


def _regression(output: Tensor, inputs: Tensor) -> Tensor:
    return (output - inputs.flip(1)).square().mean()
