"""The private torch APIs this package rests on, all of them; tested on torch 2.11 and 2.13."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed._composable import checkpoint as checkpoint  # composable: leaves parameter names alone
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import _disable_current_modes


def all_gather(x: Tensor, group_size: int, group_name: str) -> Tensor:
    """``(n, ...)`` on each rank -> ``(group_size * n, ...)``. Functional, so that ``torch.compile`` can trace it."""
    out = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), group_size, group_name)
    return torch.ops._c10d_functional.wait_tensor(out)


def reduce_scatter(x: Tensor, group_size: int, group_name: str) -> Tensor:
    """``(group_size * n, ...)`` on each rank -> this rank's ``(n, ...)`` of the sum."""
    out = torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", group_size, group_name)
    return torch.ops._c10d_functional.wait_tensor(out)


def all_reduce(x: Tensor, group_name: str, op: str = "sum") -> Tensor:
    """``(...)`` on each rank -> ``(...)`` of the sum (or ``op``) over the ranks, in a new tensor."""
    out = torch.ops._c10d_functional.all_reduce(x.contiguous(), op, group_name)
    return torch.ops._c10d_functional.wait_tensor(out)


COLLECTIVE_RESULTS = (
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
)


def after_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the backward that is running has finished; FSDP2 ends its own backward the same way."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def current_backward() -> int:
    """A number for the backward that is running; no two backwards have the same."""
    return torch._C._current_graph_task_id()


def draw() -> int:
    """A number from torch's default CPU generator, real whatever else is fake, recorded or traced around this."""
    with _disable_current_modes():
        return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fail on the device if ``condition`` is false, without making the host wait for it."""
    torch._assert_async(condition, message)


def flatten(mesh: DeviceMesh) -> None:
    """Let DTensor reduce over all dimensions of ``mesh`` at once (the gradient norm); it warns where it cannot."""
    mesh._flatten()


def foreach_norms(tensors: list[Tensor], norm_type: float) -> list[Tensor]:
    """The norm ``()`` of each tensor, in fp32 for half precision; one kernel for many tensors."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    wide = {dtype: torch.promote_types(dtype, torch.float32) for dtype in by_dtype}
    return [norm for d, same in by_dtype.items() for norm in torch._foreach_norm(same, norm_type, dtype=wide[d])]


def foreach_mul_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply each tensor by the tensor ``()`` ``factor`` in place."""
    torch._foreach_mul_(tensors, factor)
