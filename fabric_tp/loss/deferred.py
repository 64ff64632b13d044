"""Logits that are computed when somebody looks at them, or never."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_map

from fabric_tp import _torch
from fabric_tp.autograd.collectives import SEQUENCE_DIM, Group, Layout

Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A function, and what it was called with after the logits."""


@dataclass(frozen=True, kw_only=True)
class LMHeadCall:
    """What the LM head, a linear layer split over the vocabulary, was called with."""

    hidden: Tensor
    """``(b, s, h)``, or this rank's ``(b, s/t, h)`` under the layout ``"sequence"``."""
    weight: Tensor
    """``(v/t, h)``"""
    bias: Tensor | None
    vocabulary: int
    """v, which the ranks need not divide."""
    group: Group
    layout: Layout
    padding: int
    """Rows that fill up the ranks' parts of the sequence."""
    compute: Callable[[LMHeadCall, Tensor | None], Tensor]
    """The logits of all rows, or of those of these numbers, as the layer returns them otherwise."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.hidden, self.weight) if self.bias is None else (self.hidden, self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits."""
        shape = list(self.hidden.shape)
        shape[-1] = self.vocabulary
        if self.layout == "sequence":
            shape[SEQUENCE_DIM] = shape[SEQUENCE_DIM] * self.group.size - self.padding
        return tuple(shape)


class DeferredLogits(Tensor):
    """The logits ``(b, s, v)`` of an LM head with ``fused_loss``, not computed yet.

    :func:`fabric_tp.cross_entropy` computes the loss from them without the logits ever being whole. They stay deferred
    when rows are selected or put in another shape (``logits[:, :-1]``, ``logits.view(-1, v)``), under a change of the
    floating-point type, and under softcapping, ``tanh(logits / c) * c``. Anything else gets real logits, computed for
    it, sharded as without ``fused_loss``: all ranks must then do the same. So does a module's full backward hook. A
    hook on the deferred logits themselves is called in the backward with None, since they have no gradient.
    """

    call: LMHeadCall
    rows: Tensor | None
    """Which rows of the LM head's output these are, counted from 0 in ``(b, s)``; None for all."""
    operations: tuple[Operation, ...]
    """What was done to them elementwise."""

    @staticmethod
    def of(call: LMHeadCall) -> DeferredLogits:
        return _deferred(call, call.shape, call.weight.dtype, None, (), call.inputs)

    @staticmethod
    def of_samples(parts: Sequence[Any]) -> DeferredLogits:
        """Those of all samples, of several heads' calls with some each, which are otherwise the same."""
        first = parts[0]
        call = replace(first.call, hidden=torch.cat([part.call.hidden for part in parts]))
        return _deferred(call, call.shape, first.dtype, None, first.operations, tuple(parts))

    @property
    def softcap(self) -> float | None:
        """Of the softcapping that was done; None for none.

        Raises:
            ValueError: Something else was done.
        """
        done = [operation for operation in self.operations if operation[0] not in _CASTS]
        if not done:
            return None
        functions, arguments = [function for function, *_ in done], [args for _, args, _ in done]
        if functions not in _SOFTCAPPING or arguments[0] != arguments[2] or not arguments[0][0] > 0:
            raise ValueError("These logits were changed otherwise than by softcapping.")
        return float(arguments[0][0])

    @property
    def is_plain(self) -> bool:
        """Whether nothing but softcapping was done to what the LM head computes."""
        try:
            _ = self.softcap
        except ValueError:
            return False
        return True

    def of_tokens(self, *index: Tensor) -> DeferredLogits:
        """Those of some tokens: ``logits[index]``, by a tensor for each dimension but the vocabulary's."""
        selected = _numbers(self)[index]
        shape = (*selected.shape, self.shape[-1])
        return _deferred(self.call, shape, self.dtype, selected, self.operations, (self,))

    def compute(self) -> Tensor:
        """The real logits."""
        call = self.used()
        logits = call.compute(call, self.rows)
        for function, args, kwargs in self.operations:
            logits = function(logits, *args, **kwargs)
        return logits

    def used(self) -> LMHeadCall:
        """The call, with these logits between its gradients and what the gradients are of."""
        for name in ("hidden", "weight", "bias"):
            x = getattr(self.call, name)
            if x is not None and x.requires_grad and self.requires_grad:
                return replace(self.call, **{name: _Use.apply(x, self)})
        return self.call

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls):
            deferred = _elementwise(func, *args, **kwargs) if func in _ELEMENTWISE else None
            if func in _OF_ROWS:
                deferred = _select(func, *args, **kwargs)
            if deferred is not None:
                return deferred
        try:
            return super().__torch_function__(func, types, args, kwargs)  # a question about shape, type or device
        except _Values:
            pass
        args, kwargs = tree_map(lambda x: x.compute() if isinstance(x, cls) else x, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise _Values


class _Values(Exception):
    """An operation needs the values."""


_CASTS = {Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}
_DIVIDE, _TANH, _MULTIPLY = {Tensor.div, torch.div}, {Tensor.tanh, torch.tanh}, {Tensor.mul, torch.mul}
_ELEMENTWISE = _CASTS | _DIVIDE | _TANH | _MULTIPLY
_SOFTCAPPING = [[divide, tanh, multiply] for divide in _DIVIDE for tanh in _TANH for multiply in _MULTIPLY]
_OF_ROWS = {Tensor.__getitem__, Tensor.view, Tensor.reshape, Tensor.flatten, torch.reshape, torch.flatten}


class _Defer(Function):
    """Deferred logits in the graph, where hooks of FSDP2, Fabric and modules find them. No gradient passes here."""

    @staticmethod
    def forward(
        ctx: Any,
        call: LMHeadCall,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        rows: Tensor | None,
        operations: tuple[Operation, ...],
        *sources: Tensor,
    ) -> DeferredLogits:
        ctx.set_materialize_grads(False)
        return _new(call, shape, dtype, rows, operations)

    @staticmethod
    def backward(ctx: Any, grad: None) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _Use(Function):
    """An input of the LM head where the logits are used at last: the backward tells them, and goes on to the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: DeferredLogits) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _deferred(
    call: LMHeadCall,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: Tensor | None,
    operations: tuple[Operation, ...],
    sources: tuple[Tensor, ...],
) -> DeferredLogits:
    return _Defer.apply(call, shape, dtype, rows, operations, *sources)


def _new(
    call: LMHeadCall, shape: tuple[int, ...], dtype: torch.dtype, rows: Tensor | None, operations: tuple[Operation, ...]
) -> DeferredLogits:
    logits = _torch.without_memory(DeferredLogits, shape, dtype, call.hidden.device)
    logits.call, logits.rows, logits.operations = call, rows, operations
    return logits


def _elementwise(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> DeferredLogits | None:
    """None if the result is not known to be deferrable."""
    if func in _CASTS:
        dtype = _cast(func, logits, *args, **kwargs)
        if dtype is None:
            return None
    elif kwargs or any(not isinstance(arg, (int, float)) for arg in args):
        return None
    else:
        dtype = logits.dtype
    operations = (*logits.operations, (func, args, kwargs))
    return _deferred(logits.call, logits.shape, dtype, logits.rows, operations, (logits,))


def _cast(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> torch.dtype | None:
    """The floating-point type that this changes the logits to, if it changes nothing else."""
    try:
        moved = func(torch.empty(0, dtype=logits.dtype, device="meta"), *args, **kwargs)
    except NotImplementedError:  # to a device
        return None
    return moved.dtype if moved.is_meta and moved.is_floating_point() else None


def _numbers(logits: DeferredLogits) -> Tensor:
    """Which rows of the LM head's output these are."""
    if logits.rows is not None:
        return logits.rows
    return torch.arange(logits.shape[:-1].numel(), device=logits.device).view(logits.shape[:-1])


def _select(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> DeferredLogits | None:
    """None if this does not leave every row whole."""
    rows, width = _numbers(logits), logits.shape[-1]

    def numbers(of: Tensor) -> Tensor:
        return func(of[..., None].expand(*of.shape, width), *args, **kwargs)

    try:
        trial = numbers(rows.to("meta"))  # what would be copied costs nothing there
    except (RuntimeError, IndexError, NotImplementedError):
        return None
    if trial.shape[-1:] != (width,) or trial.stride(-1):
        return None
    selected = numbers(rows)[..., 0].contiguous()
    return _deferred(logits.call, (*selected.shape, width), logits.dtype, selected, logits.operations, (logits,))


def autocast(x: Any) -> Any:
    """A tensor in the type that autocast gives to the inputs of a linear layer; None stays None."""
    if x is None or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
