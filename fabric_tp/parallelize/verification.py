"""Does a divided model compute what it computed whole? Its embedding, a block of each kind and its head, once.

First on tensors without memory, where nothing waits for another process: a forward that counts with a number that is
now divided among the ranks fails there. Then, where there are weights, on a small input, by comparison.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fabric_tp import _torch
from fabric_tp._torch import FakeTensor
from fabric_tp.loss.deferred import DeferredLogits
from fabric_tp.mesh import TENSOR_PARALLEL, device_of, fake_mesh, fake_tensors
from fabric_tp.parallelize.draws import Place, check_draws
from fabric_tp.parallelize.excerpt import (
    one_of_each_kind,
    with_only,
    without_memory,
)
from fabric_tp.parallelize.expected import CannotRun, Expected, expect, run
from fabric_tp.parallelize.layouts import Shapes, check_layouts

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Of the largest value. Sums in another order stay far below, and a wrong split comes out far above."""

DTYPES = (None, torch.bfloat16)
"""The model's own, and the only one in which grouped matrix products have a form without memory."""

HINT = (
    "In the attention, replicate_attention=True helps. Otherwise describe the model by an Architecture of your own"
    " (fabric_tp/architectures/README.md), or by a plan for fabric_tp.from_plan(); verify=False takes it as it is."
)

PACKAGES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


@contextmanager
def verified(
    model: nn.Module, blocks: Sequence[nn.Module], divide: Callable[[nn.Module], object], mesh: DeviceMesh, must: bool
) -> Iterator[None]:
    """Within it the model must be divided; it is run before and after, if it has weights.

    Args:
        model: On every rank with the same values.
        blocks: Its blocks.
        divide: What is about to be done to the model; first it is tried on a copy without memory.
        mesh: The tensor-parallel ranks.
        must: It is an error if no arguments are found with which the whole model runs; otherwise a warning.

    Raises:
        ValueError: The divided model fails, with the module and the line, or it gives something else.
    """
    has_values = not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    try:
        expected = expect(model, blocks, mesh.size(), device_of(mesh)) if has_values else None
        if expected is None:
            verify_shapes(model, blocks, divide, mesh)
        elif not _runs_divided(model, blocks, expected, divide, mesh):
            with suppress(CannotRun):  # some operations have no form without memory
                verify_shapes(model, blocks, divide, mesh)
    except CannotRun as error:
        message = f"Whether this {type(model).__name__} is parallelized right could not be verified: {error}."
        if must:
            raise ValueError(f"{message} Compare it by fabric_tp.testing.check_parity, and leave verify out.") from None
        warnings.warn(f"{message} Compare it by fabric_tp.testing.check_parity; verify=False is silent.", stacklevel=2)
        expected = None
    yield
    if expected:
        compare(model, expected, mesh)


def _runs_divided(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    expected: Expected,
    divide: Callable[[nn.Module], object],
    mesh: DeviceMesh,
) -> bool:
    """Whether a divided copy without memory runs; if not, :func:`verify_shapes` finds out whose fault that is."""
    with fake_tensors(), _torch.silent_fake_tensors():
        for dtype in DTYPES:
            others = [block for block in blocks if block not in expected.blocks]
            fake = without_memory(model, torch.device(mesh.device_type), dtype, others)
            whole = expected.without_memory(model, fake, dtype)
            divide(fake)
            with suppress(ValueError):
                compare(fake, whole, mesh)
                return True
    return False


def verify_without_ranks(
    model: nn.Module, blocks: Sequence[nn.Module], divide: Callable[..., object], tensor_parallel_size: int
) -> None:
    """:func:`verify_shapes` in a process that is no rank; in one that is, nothing.

    Args:
        divide: ``divide(model, mesh=mesh)``.
    """
    if dist.is_initialized():
        return
    with fake_mesh(1, tensor_parallel_size) as mesh, suppress(CannotRun):
        tensor_parallel = mesh[TENSOR_PARALLEL]
        verify_shapes(model, blocks, partial(divide, mesh=tensor_parallel), tensor_parallel)


def verify_shapes(
    model: nn.Module, blocks: Sequence[nn.Module], divide: Callable[[nn.Module], object], mesh: DeviceMesh
) -> None:
    """Divide a copy without memory and run it, which communicates with nobody.

    Raises:
        ValueError: The divided copy cannot run.
        CannotRun: Nor can the whole model, with any arguments that were tried.
    """
    chosen = one_of_each_kind(blocks)
    others = [block for block in blocks if block not in chosen]
    names = [name for name, module in model.named_modules() if module in chosen]
    with fake_tensors(), _torch.silent_fake_tensors():
        device = torch.device(mesh.device_type)
        for dtype in DTYPES:
            fake = without_memory(model, device, dtype, others)
            fake_blocks = [fake.get_submodule(name) for name in names]
            try:
                expected = expect(fake, fake_blocks, mesh.size(), device)
            except CannotRun:
                if dtype:
                    raise
                continue
            divide(fake)
            return compare(fake, expected, mesh)


def compare(model: nn.Module, expected: Expected, mesh: DeviceMesh) -> None:
    """Run the divided model on the same input.

    Raises:
        ValueError: It fails, or gives something else.
    """
    check_draws(expected.draws)
    at: Place = []
    shapes: Shapes = {}
    try:
        with with_only(expected.blocks, model):
            outputs = run(model, expected.blocks, expected.arguments, shapes, at)
    except Exception as error:
        name, module = at[-1] if at else ("", model)
        raise ValueError(
            f"{name or 'The model'} ({class_name(module)}) cannot run on one of {mesh.size()} ranks:"
            f" {str(error).splitlines()[0]}{_line(error)}. Does it use a number that counts what is now divided, such"
            f" as the heads or their features? {HINT}"
        ) from error
    check_layouts(model, expected.shapes, shapes)
    wholes = expected.outputs
    off = [_off(outputs[name], whole, mesh) for name, whole in wholes.items()]
    if not any(isinstance(whole, FakeTensor) for whole in wholes.values()):
        largest = torch.tensor(off, device=device_of(mesh))  # on all ranks the same, or one would wait for the others
        dist.all_reduce(largest, dist.ReduceOp.MAX, mesh.get_group())
        off = largest.tolist()
    for (name, whole), each in zip(wholes.items(), off, strict=True):
        if not each <= TOLERANCES.get(whole.dtype, 1e-3):
            raise ValueError(
                f"{name or 'The model'} gives something else on {mesh.size()} ranks than on one device: {each:.1e} off,"
                f" relative to its largest value. It computes something that its description does not say. {HINT}"
            )


def _off(output: Any, whole: Tensor, mesh: DeviceMesh) -> float:
    """How far the output is from this rank's part of the whole one, of its largest value; without values 0."""
    if isinstance(output, DeferredLogits):
        output = output.compute()
    if isinstance(output, DTensor):
        output = output.to_local()
    if output.dim() != whole.dim():
        return float("inf")
    for dim in range(output.dim()):
        if output.shape[dim] != whole.shape[dim]:  # of the sequence or of the vocabulary
            whole = whole.chunk(mesh.size(), dim)[mesh.get_local_rank()]
    if output.shape != whole.shape:
        return float("inf")
    if isinstance(whole, FakeTensor):
        return 0.0
    return float((output - whole).abs().max() / whole.abs().max().clamp(min=torch.finfo(whole.dtype).tiny))


def class_name(module: nn.Module) -> str:
    """Without what dividing it has added."""
    return type(module).__name__.rpartition("[")[2].rstrip("]")


def _line(error: BaseException) -> str:
    """The last line on the way to the error that is the model's own."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(PACKAGES):
            return f", at {Path(frame.filename).name}:{frame.lineno}, `{frame.line}`"
    return ""
