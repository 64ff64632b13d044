"""The collectives of forward and backward, one autograd function each, in conjugate pairs.

Each takes the plain local tensor of one tensor-parallel rank. Sequence parallelism and the pairs: Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models" (2022), figure 5; the names are Megatron-LM's.

=====================  ==============  ==============
function               forward         backward
=====================  ==============  ==============
copy                   nothing         all-reduce
reduce                 all-reduce      nothing
gather                 all-gather      reduce-scatter
reduce_scatter         reduce-scatter  all-gather
gather_replicated      all-gather      own slice
scatter                own slice       all-gather
all_reduce             all-reduce      all-reduce
whole_blocks           all-to-all      all-to-all
=====================  ==============  ==============

:func:`sum_over_ranks`, :func:`maximum_over_ranks` and :func:`stack_over_ranks` have no gradient: they are for the
forward of an autograd function that knows its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh

from fabric_tp import _torch
from fabric_tp.autograd.halves import current_half, exchanged
from fabric_tp.autograd.padding import cut, fill, rows_to_fill

SEQUENCE_DIM = 1

Layout = Literal["replicate", "sequence"]
"""How activations lie between the sharded parts: whole on every rank, or each rank holding its part of the sequence."""


@dataclass(frozen=True)
class Group:
    """The tensor-parallel ranks, in a form that ``torch.compile`` can hold as constants."""

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Group:
        return cls(name=mesh.get_group().group_name, size=mesh.size(), rank=mesh.get_local_rank())

    @classmethod
    def alone(cls) -> Group:
        """One rank, which has everything."""
        return cls(name="", size=1, rank=0)


def copy(x: Tensor, group: Group) -> Tensor:
    """A replicated ``(..., n)`` enters a sharded computation: each rank adds a part to its gradient."""
    if current_half() and group.size > 1:
        return exchanged(x, None, partial(start_reduce, name=group.name))
    return x if group.size == 1 else _Copy.apply(x, group.name)


def reduce(x: Tensor, group: Group) -> Tensor:
    """Partial sums ``(..., n)`` on each rank -> their sum on every rank."""
    if current_half() and group.size > 1:
        return exchanged(x, partial(start_reduce, name=group.name), None)
    return x if group.size == 1 else _Reduce.apply(x, group.name)


def gather(x: Tensor, group: Group, dim: int = SEQUENCE_DIM, padding: int = 0) -> Tensor:
    """Shards ``(b, s/t, n)`` enter a sharded computation on the whole ``(b, s, n)``; the last rows are cut off."""
    dim %= x.dim()
    if current_half() and group.size > 1:
        ways: Any = {"dim": dim, "size": group.size, "name": group.name}
        return exchanged(x, partial(start_gather, padding=padding, **ways), partial(start_reduce_scatter, **ways))
    return x if group.size == 1 else _Gather.apply(x, dim, group.size, group.name, padding)


def traceable_gather(x: Tensor, group: Group, padding: int = 0, dim: int = SEQUENCE_DIM) -> Tensor:
    """As :func:`gather`, without an autograd function, inside which torch 2.11's compiler makes nothing again."""
    start = _torch.start_differentiable_all_gather
    return start_gather(x, dim, group.size, group.name, padding, start)()


def reduce_scatter(x: Tensor, group: Group, dim: int = SEQUENCE_DIM, then: Callable[[], None] | None = None) -> Tensor:
    """Partial sums ``(b, s, n)`` on each rank -> this rank's shard ``(b, s/t, n)`` of their sum.

    ``then`` is called in the backward when the gradient has been gathered, and the link is free.
    """
    dim %= x.dim()
    if current_half() and group.size > 1:
        ways: Any = {"dim": dim, "size": group.size, "name": group.name}
        padding = rows_to_fill(x.shape[dim], group.size)
        return exchanged(x, partial(start_reduce_scatter, **ways), partial(start_gather, padding=padding, **ways), then)
    return x if group.size == 1 else _ReduceScatter.apply(x, dim, group.size, group.name, then)


def gather_replicated(x: Tensor, group: Group, dim: int = -1, padding: int = 0) -> Tensor:
    """Shards ``(..., n/t)`` -> the whole on every rank, where what follows is the same on every rank."""
    if group.size == 1:
        return x
    return _GatherReplicated.apply(x, dim % x.dim(), group.size, group.rank, group.name, padding)


def scatter(x: Tensor, group: Group, dim: int = SEQUENCE_DIM) -> Tensor:
    """The whole ``(b, s, n)``, the same on every rank -> this rank's shard ``(b, s/t, n)``."""
    return x if group.size == 1 else _Scatter.apply(x, dim % x.dim(), group.size, group.rank, group.name)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Partial sums ``(..., n)`` -> their sum, which each rank then uses for something of its own."""
    return copy(reduce(x, group), group)


def whole_blocks(x: Tensor, group: Group, dim: int, length: int, blocks: int) -> Tensor:
    """Shards that may end within a block -> this rank's whole blocks, for a weight of which no head may be cut.

    Args:
        x: The next ``ceil(length / t)`` rows along ``dim`` on each rank, and what is left on the last.
        group: The ranks.
        dim: The dimension.
        length: Of the whole.
        blocks: Equal parts of the whole. Each rank gets the next ``ceil(blocks / t)``, and zeros after the last.
    """
    return x if group.size == 1 else _WholeBlocks.apply(x, dim % x.dim(), group, length, blocks)


def sum_over_ranks(x: Tensor, group: Group) -> Tensor:
    """``(...)`` on each rank -> their sum on every rank; no gradient."""
    return x if group.size == 1 else _torch.all_reduce(x, group.name)


def maximum_over_ranks(x: Tensor, group: Group) -> Tensor:
    """``(...)`` on each rank -> their maximum on every rank; no gradient."""
    return x if group.size == 1 else _torch.all_reduce(x, group.name, "max")


def stack_over_ranks(x: Tensor, group: Group) -> Tensor:
    """``(...)`` on each rank -> ``(t, ...)`` on every rank; no gradient."""
    return x[None] if group.size == 1 else _torch.all_gather(x[None], group.size, group.name)


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _torch.all_reduce(grad, ctx.name), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        return _torch.all_reduce(x, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, name: str, padding: int) -> Tensor:
        ctx.dim, ctx.size, ctx.name = dim, size, name
        return start_gather(x, dim, size, name, padding)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return start_reduce_scatter(grad, ctx.dim, ctx.size, ctx.name)(), None, None, None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, name: str, then: Callable[[], None] | None) -> Tensor:
        ctx.dim, ctx.size, ctx.name, ctx.padding = dim, size, name, rows_to_fill(x.shape[dim], size)
        ctx.then = then
        return start_reduce_scatter(x, dim, size, name)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gathered = start_gather(grad, ctx.dim, ctx.size, ctx.name, ctx.padding)()
        if ctx.then:
            ctx.then()
        return gathered, None, None, None, None


class _GatherReplicated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, rank: int, name: str, padding: int) -> Tensor:
        ctx.dim, ctx.size, ctx.rank = dim, size, rank
        return start_gather(x, dim, size, name, padding)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = fill(grad, ctx.dim, ctx.size).chunk(ctx.size, ctx.dim)[ctx.rank]
        return own.contiguous(), None, None, None, None, None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, rank: int, name: str) -> Tensor:
        ctx.dim, ctx.size, ctx.name, ctx.padding = dim, size, name, rows_to_fill(x.shape[dim], size)
        return fill(x, dim, size).chunk(size, dim)[rank].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return start_gather(grad, ctx.dim, ctx.size, ctx.name, ctx.padding)(), None, None, None, None


class _WholeBlocks(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group, length: int, blocks: int) -> Tensor:
        ctx.dim, ctx.name = dim, group.name
        stored, needed = -(-length // group.size), length // blocks * -(-blocks // group.size)
        ctx.sent = _overlaps(group, stored, needed, length)
        ctx.received = _overlaps(group, needed, stored, length)
        y = _torch.all_to_all(x.movedim(dim, 0), ctx.received, ctx.sent, group.name)
        zeros = y.new_zeros(needed - len(y), *y.shape[1:])
        return torch.cat([y, zeros]).movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = grad.movedim(ctx.dim, 0)[: sum(ctx.received)]
        shard = _torch.all_to_all(own, ctx.sent, ctx.received, ctx.name)
        return shard.movedim(0, ctx.dim).contiguous(), None, None, None, None


def _overlaps(group: Group, mine: int, theirs: int, length: int) -> list[int]:
    """How many rows of this rank's, which has the next ``mine``, are among each other rank's next ``theirs``."""
    first, last = (min(rank * mine, length) for rank in (group.rank, group.rank + 1))
    ends = [min(rank * theirs, length) for rank in range(group.size + 1)]
    return [max(0, min(last, ends[rank + 1]) - max(first, ends[rank])) for rank in range(group.size)]


def start_gather(
    x: Tensor,
    dim: int,
    size: int,
    name: str,
    padding: int = 0,
    start: Callable[[Tensor, int, str], Tensor] = _torch.start_all_gather,
) -> Callable[[], Tensor]:
    """Issue the all-gather of :func:`gather`; what is returned waits for it."""
    if x.shape[:dim].numel() == 1:  # nothing before dim: the ranks' shards already lie one after the other
        flat = start(x.flatten(0, dim), size, name)
        return lambda: cut(_unflatten_(_torch.wait(flat), dim), dim, padding)
    shards = start(x, size, name)
    return lambda: cut(torch.cat(_torch.wait(shards).chunk(size), dim), dim, padding)


def start_reduce_scatter(x: Tensor, dim: int, size: int, name: str) -> Callable[[], Tensor]:
    """Issue the reduce-scatter of :func:`reduce_scatter`; what is returned waits for it."""
    x = fill(x, dim, size)
    if x.shape[:dim].numel() == 1:
        flat = _torch.start_reduce_scatter(x.flatten(0, dim), size, name)
        return lambda: _unflatten_(flat(), dim)
    return _torch.start_reduce_scatter(torch.cat(x.chunk(size, dim)), size, name)


def start_reduce(x: Tensor, name: str) -> Callable[[], Tensor]:
    """Issue the all-reduce of :func:`reduce`; what is returned waits for it."""
    summed = _torch.start_all_reduce(x, name)
    return lambda: _torch.wait(summed)


def _unflatten_(x: Tensor, dims: int) -> Tensor:
    """Put back leading dimensions of 1, in place: FSDP2 warns of modules that return a view."""
    if torch.compiler.is_compiling():  # in an autograd function, the compiler would miss that the shape has changed
        return x[(None,) * dims]
    for _ in range(dims):
        x.unsqueeze_(0)
    return x
