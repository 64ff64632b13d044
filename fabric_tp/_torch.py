"""The private torch APIs this package rests on, all of them; tested on torch 2.11 and 2.13."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import _register_work
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as unset_fake_temporarily
from torch.distributed._composable import checkpoint as checkpoint  # composable: leaves parameter names alone
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.placement_types import Placement
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

Subclass = TypeVar("Subclass", bound=Tensor)


class OperationMode(TorchDispatchMode):
    """Sees operations on plain and on fake tensors; those of a DTensor and the like come as what they do with these."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(cls not in (Tensor, nn.Parameter, FakeTensor) for cls in types):
            return NotImplemented
        if operation is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for a dozen times in each operation
        return self.see(operation, args, kwargs or {})

    def see(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What to do in the operation's place; its result."""
        raise NotImplementedError


def forget_meshes() -> None:
    """Empty the caches of DTensor's operations: they give their results the mesh of an earlier operation on an equal
    one, whose process groups may be gone."""
    _clear_sharding_prop_cache()


def local_and_layout(x: DTensor) -> tuple[Tensor, DTensorSpec]:
    """What this rank has, itself and not a view; and mesh, placements, shape, strides and dtype of the whole."""
    return x._local_tensor, x._spec


def with_layout(local: Tensor, like: DTensorSpec, placements: tuple[Placement, ...]) -> DTensor:
    """A DTensor of which ``local`` is this rank's part. ``local`` has the strides that the layout gives it."""
    if torch.is_grad_enabled():  # for second derivatives
        return DTensor.from_local(local, like.mesh, placements, run_check=False, shape=like.shape, stride=like.stride)
    same = placements == like.placements
    spec = copy.copy(like) if same else DTensorSpec(like.mesh, placements, tensor_meta=like.tensor_meta)
    return DTensor.__new__(DTensor, local, spec, requires_grad=False)  # whose __init__ does nothing


def start_all_gather(x: Tensor, group_size: int, group_name: str) -> Tensor:
    """As :func:`all_gather`; the result is there after :func:`wait`. Functional, so that the compiler can trace it.

    On the CPU by another operator: of several functional ones at once gloo's threads write where nothing is to be
    written (torch 2.13; a program with four of them in flight, and nothing else, ends within seconds).
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or is_fake(x):
        return _issue(ALL_GATHER, x.contiguous(), group_size, group_name)
    gathered = x.new_empty((group_size * x.shape[0], *x.shape[1:]))
    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    _register_work(gathered, group._allgather_base(gathered, x.contiguous()))
    return gathered


def start_differentiable_all_gather(x: Tensor, group_size: int, group_name: str) -> Tensor:
    """As :func:`start_all_gather`; its gradient is the reduce-scatter of the output's."""
    return DIFFERENTIABLE_ALL_GATHER(x.contiguous(), group_size, group_name)


def start_reduce_scatter(x: Tensor, group_size: int, group_name: str) -> Callable[[], Tensor]:
    """As :func:`reduce_scatter`; what is returned waits for the result.

    On the CPU each rank adds up what it gets: gloo's own is an all-reduce, which sends twice as much (torch 2.13).
    """
    x = x.contiguous()
    if torch.compiler.is_compiling() or x.device.type != "cpu" or is_fake(x):
        return partial(wait, _issue(REDUCE_SCATTER, x, "sum", group_size, group_name))
    parts = torch.empty_like(x)
    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    _register_work(parts, group.alltoall_base(parts, x, [], []))
    return lambda: wait(parts).unflatten(0, (group_size, -1)).sum(0)


def start_all_reduce(x: Tensor, group_name: str, op: str = "sum") -> Tensor:
    """As :func:`all_reduce`; the result is there after :func:`wait`."""
    return _issue(ALL_REDUCE, x.contiguous(), op, group_name)


def all_to_all(x: Tensor, received: list[int], sent: list[int], group_name: str) -> Tensor:
    """``(sum(sent), ...)``, the next ``sent[i]`` rows of it for rank i -> ``(sum(received), ...)`` in the same way."""
    return wait(_FUNCTIONAL.all_to_all_single(x.contiguous(), received, sent, group_name))


def wait(x: Tensor) -> Tensor:
    return _issue(_FUNCTIONAL.wait_tensor.default, x)


def _issue(operator: Any, *args: Any) -> Tensor:
    """Call an operator that has no gradient, below autograd, where torch would do something in Python for each."""
    if torch.compiler.is_compiling():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def all_gather(x: Tensor, group_size: int, group_name: str) -> Tensor:
    """``(n, ...)`` on each rank -> ``(group_size * n, ...)``."""
    return wait(start_all_gather(x, group_size, group_name))


def reduce_scatter(x: Tensor, group_size: int, group_name: str) -> Tensor:
    """``(group_size * n, ...)`` on each rank -> this rank's ``(n, ...)`` of the sum."""
    return start_reduce_scatter(x, group_size, group_name)()


def all_reduce(x: Tensor, group_name: str, op: str = "sum") -> Tensor:
    """``(...)`` on each rank -> ``(...)`` of the sum (or ``op``) over the ranks, in a new tensor."""
    return wait(start_all_reduce(x, group_name, op))


_FUNCTIONAL = torch.ops._c10d_functional
ALL_GATHER = _FUNCTIONAL.all_gather_into_tensor.default
DIFFERENTIABLE_ALL_GATHER = torch.ops._c10d_functional_autograd.all_gather_into_tensor.default
REDUCE_SCATTER, ALL_REDUCE = _FUNCTIONAL.reduce_scatter_tensor.default, _FUNCTIONAL.all_reduce.default
COLLECTIVE_RESULTS = (REDUCE_SCATTER, ALL_REDUCE)


def enable_symmetric_memory(group_name: str) -> None:
    """Let the ranks of a group of CUDA devices read and write each other's memory; they agree when they first do."""
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group_name)  # type: ignore[arg-type]


def fused_operators() -> tuple[Any, Any]:
    """A gather and the products after it, and a product and the reduce-scatter after it, each as one."""
    import torch.distributed._symmetric_memory  # defines them

    return torch.ops.symm_mem.fused_all_gather_matmul.default, torch.ops.symm_mem.fused_matmul_reduce_scatter.default


def fuse_collectives(graph: torch.fx.Graph) -> None:
    """Put fused operators in the place of what they do, where the graph has the form for it."""
    from torch._inductor.fx_passes.micro_pipeline_tp import micro_pipeline_tp_pass

    micro_pipeline_tp_pass(graph)


def graph_pass(change: Callable[[torch.fx.Graph], None]) -> Any:
    """What the compiler calls with each graph, which it then never takes from what it has on disk."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            change(graph)

        def uuid(self) -> None:
            return None

    return Pass()


def after_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the backward that is running has finished; FSDP2 ends its own backward the same way."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def current_backward() -> int:
    """A number for the backward that is running, -1 if there is none; no two backwards have the same."""
    return torch._C._current_graph_task_id()


def draw() -> int:
    """A number from torch's default CPU generator, real whatever else is fake, recorded or traced around this."""
    with _disable_current_modes():
        return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def function_of(node: object) -> Any:
    """The ``torch.autograd.Function`` whose node this is, and whose forward and backward get it as ``ctx``; or None."""
    return getattr(node, "_forward_cls", None)


def comes_to(node: Any) -> bool:
    """Whether the backward that is running comes to this node; ``torch.autograd.grad`` need not come to all."""
    return torch._C._will_engine_execute_node(node)


def is_watched(x: Tensor) -> bool:
    """Whether somebody is to see the gradient of ``x``: a hook, or :meth:`torch.Tensor.retain_grad`."""
    return bool(x._backward_hooks) or x.retains_grad


def flash_attention_takes_groups(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether causal attention with fewer key and value heads than query heads runs without a matrix of all scores."""
    if not q.is_cuda:
        return True
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, True)
    return torch.backends.cuda.can_use_flash_attention(parameters)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fail on the device if ``condition`` is false, without making the host wait for it."""
    torch._assert_async(condition, message)


def flatten(mesh: DeviceMesh) -> None:
    """Let DTensor reduce over all dimensions of ``mesh`` at once (the gradient norm); it warns where it cannot."""
    mesh._flatten()


def process_groups() -> list[torch.distributed.ProcessGroup]:
    """The groups this process belongs to, in the order in which they were made; the default one is the first."""
    return list(torch.distributed.distributed_c10d._world.pg_map)


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


def register_first_step_post_hook(optimizer: Optimizer, hook: Callable[..., None]) -> RemovableHandle:
    """Like ``optimizer.register_step_post_hook``, but ``hook`` runs before those that are there."""
    handle = optimizer.register_step_post_hook(hook)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    return handle


def is_traced() -> bool:
    """Whether the compiler, in any of its passes, runs what calls this."""
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


def silence_compiler_on_checkpoints() -> None:
    """Whoever gives ``context_fn`` to a checkpoint within a compiled function is told not to use in-place operators."""
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_not_about_context_fn)


def _is_not_about_context_fn(record: logging.LogRecord) -> bool:
    return "context_fn is passed" not in record.getMessage()


def is_fake(x: Tensor) -> bool:
    """Whether ``x`` has a shape and no values, as in a step that only counts memory."""
    return x.is_meta or isinstance(x, FakeTensor)


@contextmanager
def silent_fake_tensors() -> Iterator[None]:
    """Within it an operation that has no form without memory only raises; otherwise it is logged, with a traceback."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def without_memory(cls: type[Subclass], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Subclass:
    """A tensor that is nothing but its shape; its class must define ``__torch_dispatch__``."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]


def group_name(argument: object) -> str | None:
    """The process group's name, if that is what this argument of a collective's operator is."""
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in argument._type().name():  # type: ignore[attr-defined]
        argument = torch.distributed.ProcessGroup.unbox(argument)  # type: ignore[attr-defined]
    if isinstance(argument, torch.distributed.ProcessGroup):
        return argument.group_name
    ways_to_reduce = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")
    return argument if isinstance(argument, str) and argument not in ways_to_reduce else None
