"""Does a divided model compute what it computed whole? Its embedding, a block of each kind and its head, once.

First on tensors without memory, where nothing waits for another process: a forward that counts with a number that is
now divided among the ranks fails there. Then, where there are weights, on a small input, by comparison.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from fabric_tp import _torch
from fabric_tp._torch import FakeTensor
from fabric_tp.loss.deferred import DeferredLogits
from fabric_tp.mesh import TENSOR_PARALLEL, device_of, fake_mesh, fake_tensors
from fabric_tp.parallelize.arguments import needed_arguments, sample_arguments
from fabric_tp.parallelize.draws import Draw, Draws, Place, check_draws
from fabric_tp.parallelize.excerpt import (
    attributes_kept,
    in_mode,
    on_device,
    one_of_each_kind,
    with_only,
    without_memory,
)
from fabric_tp.parallelize.layouts import Shapes, check_layouts

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Of the largest value. Sums in another order stay far below, and a wrong split comes out far above."""

HINT = (
    "In the attention, replicate_attention=True helps. Otherwise describe the model by an Architecture of your own"
    " (fabric_tp/architectures/README.md), or by a plan for fabric_tp.from_plan(); verify=False takes it as it is."
)

PACKAGES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


class CannotRun(Exception):
    """No arguments could be made up with which the whole model runs."""


@dataclass(frozen=True)
class Expected:
    """What the whole model gave, and to what."""

    arguments: dict[str, Any]
    blocks: list[nn.Module]
    """One of each kind, as they were; all that ran."""
    outputs: dict[str, Tensor]
    """By the names of modules, in the order in which they ran; the model's own last, as ``""``."""
    shapes: Shapes
    draws: list[Draw]
    """What is drawn in training."""


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
        try:
            verify_shapes(model, blocks, divide, mesh)
        except CannotRun:  # some operations have no form without memory
            if not has_values:
                raise
        expected = expect(model, blocks, mesh.size(), device_of(mesh)) if has_values else None
    except CannotRun as error:
        message = f"Whether this {type(model).__name__} is parallelized right could not be verified: {error}."
        if must:
            raise ValueError(f"{message} Compare it by fabric_tp.testing.check_parity, and leave verify out.") from None
        warnings.warn(f"{message} Compare it by fabric_tp.testing.check_parity; verify=False is silent.", stacklevel=2)
        expected = None
    yield
    if expected:
        compare(model, expected, mesh)


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
    names = [name for name, module in model.named_modules() if any(module is block for block in blocks)]
    with fake_tensors(), _torch.silent_fake_tensors():
        device = torch.device(mesh.device_type)
        for dtype in (None, torch.bfloat16):  # in which alone grouped matrix products have a form without memory
            fake = without_memory(model, device, dtype)
            fake_blocks = [fake.get_submodule(name) for name in names]
            try:
                expected = expect(fake, fake_blocks, mesh.size(), device)
            except CannotRun:
                if dtype:
                    raise
                continue
            divide(fake)
            return compare(fake, expected, mesh)


def expect(model: nn.Module, blocks: Sequence[nn.Module], size: int, device: torch.device) -> Expected:
    """Run the whole model on a small input, of a length that ``size`` ranks divide.

    Raises:
        CannotRun: It runs with none of the arguments that were tried.
    """
    chosen, errors = one_of_each_kind(blocks), []
    for arguments in sample_arguments(model, size, device):
        shapes: Shapes = {}
        try:
            with with_only(chosen, model), on_device(device, model):
                outputs = _run(model, chosen, arguments, shapes)
                return Expected(arguments, chosen, outputs, shapes, _draws(model, chosen, arguments, device))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
    needed = ", ".join(needed_arguments(model))
    raise CannotRun(f"its forward takes {needed}" + (f" and ends in {errors[-1]}" if errors else ""))


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
            outputs = _run(model, expected.blocks, expected.arguments, shapes, at)
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


def _run(
    model: nn.Module,
    chosen: list[nn.Module],
    arguments: dict[str, Any],
    shapes: Shapes,
    at: Place | None = None,
    training: bool = False,
) -> dict[str, Tensor]:
    """Outputs of the chosen modules and of the model; ``shapes`` gets those of all modules' outputs.

    On an error ``at`` ends with the module that it happened in.
    """
    outputs: dict[str, Tensor] = {}
    at = [] if at is None else at
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: object) -> None:
        at.append((names.get(module, ""), module))

    def leave(module: nn.Module, args: object, output: Any) -> None:
        at.pop()
        leaf = next((each for each in tree_leaves(output) if isinstance(each, Tensor)), None)
        if leaf is not None:
            shapes[module] = leaf.shape
        if module in chosen:
            outputs.setdefault(names[module], first_tensor(output))

    with attributes_kept(model), in_mode(model, training), torch.no_grad():
        hooks = [module.register_forward_pre_hook(enter, prepend=True) for module in model.modules()]
        hooks += [module.register_forward_hook(leave) for module in model.modules()]
        try:
            output = model(**arguments)
        finally:
            for hook in hooks:
                hook.remove()
    return {**outputs, "": first_tensor(output)}


def _draws(model: nn.Module, chosen: list[nn.Module], arguments: dict[str, Any], device: torch.device) -> list[Draw]:
    at: Place = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), Draws(at) as draws, suppress(Exception):  # training may need other arguments
        _run(model, chosen, arguments, {}, at, training=True)
    return draws.found


def first_tensor(output: Any) -> Tensor:
    """The logits, first of all that a model returns."""
    logits = getattr(output, "logits", None)
    return logits if logits is not None else next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


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
