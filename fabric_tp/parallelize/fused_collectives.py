"""Asynchronous tensor parallelism: collectives that the compiler makes one operator with the products beside them.

torch's own pass does it, for groups with symmetric memory (CUDA devices that reach each other's memory), and for
nothing but a gather that a product follows at once, and a product that a reduce-scatter follows; where anything is
between them it silently leaves both as they are. So the graph is brought into that form before it, and looked at after.
What is left, in the backward the second gather of an input and the sum of its gradient, is ordered to run beside other
products.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.fx import Graph, Node

from fabric_tp import _torch
from fabric_tp.autograd.collectives import Group

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten.unsqueeze.default)
GATHERED = (torch.ops._c10d_functional.wait_tensor.default, aten.cat.default)
"""What gives a gathered input, along the first dimension or another."""


def fused_collectives(group: Group, device_type: str) -> dict[str, Any]:
    """Options of ``torch.compile``, for what runs on these ranks."""
    if device_type == "cuda":
        _torch.enable_symmetric_memory(group.name)
    return {
        "reorder_for_compute_comm_overlap": True,
        "post_grad_custom_post_pass": _torch.graph_pass(fuse),
    }


def fuse(graph: Graph) -> None:
    """Of a block's forward or backward."""
    bring_into_form(graph)
    _torch.fuse_collectives(graph)
    warn_if_none_is_fused(graph)


def bring_into_form(graph: Graph) -> None:
    """Leave out reshapes that end where they began, add biases after products of what was gathered, and let gathers be
    those that the pass knows."""
    for node in graph.nodes:
        if node.target in RESHAPES and _shape(_reshaped(node)) == _shape(node):
            node.replace_all_uses_with(_reshaped(node))
        elif node.target is aten.addmm.default and _reshaped(node.args[1]).target in GATHERED:
            _add_bias_after_product(node)
        elif node.target is _torch.DIFFERENTIABLE_ALL_GATHER:  # in a graph for the backward there is no autograd
            node.target = _torch.ALL_GATHER
    graph.eliminate_dead_code()  # what is left of the reshapes would look like uses of a product


def warn_if_none_is_fused(graph: Graph) -> None:
    targets = [node.target for node in graph.nodes]
    left = sum(target in (_torch.ALL_GATHER, *_torch.COLLECTIVE_RESULTS) for target in targets)
    if left and not any(target in _torch.fused_operators() for target in targets):
        warnings.warn(
            f"overlap=True: none of the {left} collectives in a compiled block is one operator with a product. That"
            " takes sequence_parallel=True, a sequence that the ranks divide, and CUDA devices that share memory, as"
            " those of one machine do.",
            stacklevel=2,
        )


def _add_bias_after_product(node: Node) -> None:
    """``(b * s, f)`` by the product of ``(b, s, h)``, which the pass knows, and a sum."""
    if any(factor != 1 for factor in node.kwargs.values()):
        return
    value, graph = node.meta["val"], node.graph
    bias, *factors = node.args
    whole = (*_shape(_reshaped(factors[0]))[:-1], value.shape[-1])  # type: ignore[index]
    steps: list[tuple[Any, tuple[Any, ...], tuple[int, ...]]] = [
        (aten.mm.default, tuple(factors), value.shape),
        (aten.reshape.default, (list(whole),), whole),
        (aten.add.Tensor, (bias,), whole),
    ]
    last: Node | None = None
    with graph.inserting_before(node):
        for target, args, shape in steps:
            last = graph.call_function(target, args if last is None else (last, *args))
            last.meta = node.meta | {"val": value.view(shape)}
    node.target, node.args, node.kwargs = aten.reshape.default, (last, list(value.shape)), {}


def _reshaped(node: Any) -> Node:
    """What a chain of reshapes began with."""
    while node.target in RESHAPES:
        node = node.args[0]
    return node


def _shape(node: Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else None
