"""Linear layers that keep no copy of an input that can be recomputed, and the inputs that several of them share.

Of a column-wise layer ``y = e W^T`` the gradient of W needs the whole input e, that of e does not. So the shard x that
e was gathered from (or what a norm made x from) is all that stays, and the backward gathers it again beside one matrix
product and sums the gradient of e over the ranks beside another (Korthikanti et al., 2022, section 4.2.2).

Two autograd functions bend autograd's contract for this, by agreement: :class:`_Linear` does not return the gradient of
an e that ``Enter`` returned. It adds to the gradient G in ``SharedInput``, where ``Enter`` finds the sum.
Two layers, A before B, with sequence parallelism:

========  ==================  ======================  ======================  ================
node      issued              gradient of the input   gradient of the weight  waited for
========  ==================  ======================  ======================  ================
forward
Enter     gather of x                                                         e
A         A(e), uses = 1
B         B(e), uses = 2
backward
B         gather of x         G = dB W_B, done = 1                            e
B                                                     dW_B = dB^T e
A                             G += dA W_A, done = 2
A         sum of G, G freed                           dW_A = dA^T e, e freed
Enter                         dx                                              dx, the sum of G
========  ==================  ======================  ======================  ================

What holds, each with a test of its name:

1.  *Enter comes last.* Autograd runs a node once all nodes of this backward that took its output have run, whatever
    they returned. So each part of G is there when ``Enter`` is asked for the gradient of x.
2.  *The counter decides when, not what.* ``uses`` counts the layers that took e in the forward, ``done`` those that
    this backward has come to. When they are equal the sum starts, before the last gradient of a weight. Where they
    never are, since a layer does not reach the loss or ran under ``no_grad``, ``Enter`` starts it; and where all their
    weights are frozen, and nothing runs beside the sum.
3.  *Backwards are apart.* What is shared belongs to the backward of one number. The next one over the same graph (which
    was retained, has two losses, or ended in an exception) starts from nothing.
4.  *Without Enter nothing is shared.* A backward that does not come to ``Enter`` (``torch.autograd.grad`` of weights)
    computes no G and no sum, and each layer recomputes e for itself.
5.  *Others go through autograd.* All else that uses e returns its gradient as usual. ``Enter`` sums what autograd
    hands it by itself: two sums at most. Layers whose weights are frozen add to G as others do, and never ask for e:
    a frozen layer and the low-rank adapter around it have one sum.
6.  *Who watches e sees its gradient.* Layers that take an e with hooks, or whose gradient is retained, return theirs.
    Otherwise autograd knows of those in 5 only, so that ``torch.autograd.grad`` with respect to e does not work.
7.  *A node in between makes a layer a plain one.* Behind a view, an operation in place or a module's backward hook
    there is no ``Enter`` to be found: the layer keeps its input and returns its gradient.
8.  *Weights are kept by reference.* Saved tensors are counted by activation checkpointing, whose recomputation stops at
    the last one: a weight would make it run the layer's product. Autograd therefore does not check whether a weight was
    changed in place, and the backward compares versions itself.
9.  *What Enter saved is taken once.* Activation checkpointing gives it out once in a backward; see ``saved`` in
    ``recompute.py``.
10. *Nothing whole outlives its use.* e is freed after the last gradient of a weight, G once its sum was issued.
11. *Gradients have their tensors' dtypes.* Products are in that of ``dy``, lower than those of e and W under autocast.
    Parts of G are added up in e's; autograd casts the gradient of W.
12. *There are no second derivatives.* Sums and gathers are not in the graph: ``create_graph=True`` is refused.
13. *The gather may begin early*: what sums the layers' outputs over the ranks starts it when that sum's gradient is
    there, if this backward comes to ``Enter`` (test_shared_input.py). ``Enter`` waits for one that no layer took.
14. *The compiler sees plain operators* and neither function: it decides by itself what is recomputed, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fabric_tp import _torch
from fabric_tp.autograd.recompute import producer_of, recompute, recomputed_by_compiler
from fabric_tp.autograd.shared_input import Enter, SharedInput, start_input, start_sum

Weight = Tensor | Callable[[], Tensor]
"""Or what gives a frozen weight, which is stored in another form, each time that it is needed; nobody keeps it."""


def linear(x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None] = ()) -> Tensor:
    """``torch.nn.functional.linear`` with a weight that is put together from parts, rows after rows.

    Neither the whole weight is kept for the backward nor, if it can be recomputed, ``x``.

    Args:
        x: ``(..., h)``.
        weights: Each ``(f, h)``. They must be parameters, or else memory that somebody holds anyway; or functions.
        biases: Each ``(f,)``; as many as weights, or none.

    Returns:
        ``(..., f)``, with the f of all parts together.

    Raises:
        RuntimeError: In the backward, if a weight was changed in place since the forward.
    """
    there = [bias for bias in biases if bias is not None]
    stored = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(stored) > 1 and not torch.is_grad_enabled() and x.shape[:-1].numel() < sum(map(len, stored)):
        # To put a few rows together costs less than to put the weights together: while tokens are generated.
        each_bias: Sequence[Tensor | None] = there or [None] * len(weights)
        return torch.cat([F.linear(x, *part) for part in zip(stored, each_bias, strict=True)], -1)
    is_whole = len(stored) == len(weights) == 1
    if torch.compiler.is_compiling():
        weight = stored[0] if is_whole else recomputed_by_compiler(_joined, list(weights))
        return F.linear(x, weight, _joined(there) if there else None)
    producer = producer_of(x)
    if producer is None and is_whole:
        return F.linear(x, stored[0], *there)
    return _Linear.apply(x, producer, len(weights), *weights, *there)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, producer: Any, count: int, *tensors: Any) -> Tensor:
        weights, biases = tensors[:count], tensors[count:]
        ctx.producer, ctx.dtype, ctx.shape = producer, x.dtype, x.shape
        ctx.weights, ctx.versions, ctx.bias_sizes = weights, _versions(weights), list(map(len, biases))
        ctx.trains = any(ctx.needs_input_grad[3 : 3 + count])
        ctx.shared_input = _shared_input(x, producer)
        if ctx.shared_input is not None:
            ctx.shared_input.uses += 1
            ctx.shared_input.readers += ctx.trains
        if producer is None and ctx.trains:
            ctx.save_for_backward(x)
        return F.linear(x, _joined(weights), _joined(biases) if biases else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = _rows(grad)
        x_grad, x = None, None
        if ctx.shared_input is None:
            if ctx.needs_input_grad[0]:
                x_grad = _input_gradient(ctx, rows)
        elif _torch.comes_to(ctx.producer):
            x = _share_gradient(ctx, rows)
        weight_grads: Sequence[Tensor | None] = [None] * len(ctx.weights)
        if ctx.trains:
            if x is None:
                x = ctx.saved_tensors[0] if ctx.producer is None else recompute(ctx.producer)
            weight_grads = (rows.t() @ _rows(x).to(rows.dtype)).split([len(weight) for weight in ctx.weights])
        return x_grad, None, None, *weight_grads, *_bias_grads(ctx, rows)


def _shared_input(x: Tensor, producer: Any) -> SharedInput | None:
    if producer is None or _torch.function_of(producer) is not Enter or _torch.is_watched(x):
        return None
    return producer.shared_input


def _share_gradient(ctx: Any, rows: Tensor) -> Tensor | None:
    """Add to the gradient of a shared input, start its sum if this is the last part of it; return the input, if the
    gradient of a weight needs it."""
    shared = ctx.shared_input
    shared.begin()
    if ctx.trains and shared.input is None:
        shared.input = start_input(ctx.producer)
    if shared.grad is None:
        shared.grad = _input_gradient(ctx, rows)
    elif rows.dtype == ctx.dtype:
        _rows(shared.grad).addmm_(rows, _weight(ctx, rows.dtype))
    else:
        _rows(shared.grad).add_(rows @ _weight(ctx, rows.dtype))
    shared.done += 1
    if shared.done == shared.uses and shared.readers:
        shared.sum, shared.grad = start_sum(ctx.producer, shared.grad), None
    if not ctx.trains:
        return None
    x = shared.input()
    shared.read += 1
    shared.input = None if shared.read == shared.readers else lambda: x
    return x


def _input_gradient(ctx: Any, rows: Tensor) -> Tensor:
    return (rows @ _weight(ctx, rows.dtype)).to(ctx.dtype).view(ctx.shape)


def _weight(ctx: Any, dtype: torch.dtype) -> Tensor:
    if ctx.versions != _versions(ctx.weights):
        raise RuntimeError("A weight was changed in place between the forward and the backward that needs it.")
    return _joined(ctx.weights).to(dtype)


def _bias_grads(ctx: Any, rows: Tensor) -> Sequence[Tensor | None]:
    needed = ctx.needs_input_grad[3 + len(ctx.weights) :]
    if not any(needed):
        return [None] * len(needed)
    return rows.sum(0).split(ctx.bias_sizes)


def _versions(weights: Sequence[Weight]) -> list[int]:
    return [weight._version for weight in weights if isinstance(weight, Tensor)]


def _joined(parts: Sequence[Weight]) -> Tensor:
    tensors = [part if isinstance(part, Tensor) else part() for part in parts]
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
