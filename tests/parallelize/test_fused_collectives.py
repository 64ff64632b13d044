"""overlap=True with compile=True: the graphs have the form that torch's asynchronous tensor parallelism matches.

On the CPU, where symmetric memory is said to be there, and torch's own fallbacks stand in for the fused operators.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import detect_fake_mode
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.virtualized import V
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.fx import Graph, GraphModule

import fabric_tp
from fabric_tp import _torch
from fabric_tp.parallelize import fused_collectives
from fabric_tp.testing.parity import Report, compare, next_token_loss
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import small_causal, small_config, small_gpt

GATHER, SUM = "fused_all_gather_matmul", "fused_matmul_reduce_scatter"
COUNTED = {
    **dict(zip(_torch.fused_operators(), (GATHER, SUM), strict=True)),
    torch.ops._c10d_functional.all_gather_into_tensor.default: "gather",
    torch.ops._c10d_functional.reduce_scatter_tensor.default: "sum",
    torch.ops._c10d_functional.all_reduce.default: "all-reduce",
}
FORWARD = {GATHER: 2, SUM: 2}
"""Of a block: all that there are."""
BACKWARD = {GATHER: 1, "gather": 3, "sum": 2}
"""The gradient of attention's output runs beside the gradients of the MLP's weights, and need not be fused."""


def without_code(module: GraphModule, inputs: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """As torch's default backend, up to where that generates code: its graphs run as they are."""

    def passed(graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        with config.patch(options), V.set_fake_mode(detect_fake_mode(inputs)):
            view_to_reshape(graph)
            post_grad_passes(graph, is_inference=False)
        graph.recompile()
        return make_boxed_func(graph.forward)

    table = select_decomp_table()
    split = min_cut_rematerialization_partition
    return aot_autograd(fw_compiler=passed, decompositions=table, partition_fn=split)(module, inputs)


@contextmanager
def symmetric() -> Iterator[None]:
    """A time in which gloo's ranks seem to have symmetric memory."""
    torch.compiler.reset()
    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", symmetric_memory._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", symmetric_memory._fused_matmul_reduce_scatter_fallback, "CPU")
    with pytest.MonkeyPatch.context() as patch, symmetric_memory._test_mode():
        patch.setattr(dist, "is_nccl_available", lambda: True)
        patch.setattr(torch, "compile", partial(torch.compile, backend=without_code))
        yield
    library._destroy()


def ran(build: Callable[[], nn.Module], batch: int, length: int, is_symmetric: bool, **options: Any) -> tuple[Any, Any]:
    """The collectives of a block's graphs on a rank, forward and backward, and warnings."""
    found: list[dict[str, int]] = []

    def count(graph: Graph) -> None:
        warn(graph)
        found.append(dict(Counter(COUNTED[node.target] for node in graph.nodes if node.target in COUNTED)))

    warn = fused_collectives.warn_if_none_is_fused
    enabled = nullcontext() if is_symmetric else symmetric_memory._test_mode({"another"})
    with symmetric(), enabled, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.setattr(fused_collectives, "warn_if_none_is_fused", count)
        model = fabric_tp.auto(compile=True, overlap=True, **options)(build(), mesh(1, 2))
        tokens = torch.randint(90, (batch, length), generator=torch.Generator().manual_seed(0))
        next_token_loss(model(tokens), tokens).backward()
    return found, [str(each.message) for each in warned if "overlap=True" in str(each.message)]


MODELS = {
    "llama": partial(small_causal, "llama"),
    "litgpt": partial(small_gpt, small_config("Llama-3-8B")),
    "biases": partial(small_gpt, small_config("pythia-14m", parallel_residual=False)),
}


FIRST = BACKWARD | {"gather": 4}
"""Where the whole of a gradient is what is before the blocks."""


@pytest.mark.parametrize(
    ("name", "batch", "backwards"),
    [("litgpt", 1, [BACKWARD]), ("biases", 2, [{GATHER: 2, "gather": 2, "sum": 2}]), ("llama", 2, [BACKWARD, FIRST])],
    ids=str,
)
def test_collectives_are_fused(pool, name, batch, backwards) -> None:
    graphs, warned = pool(2)(ran, MODELS[name], batch, 16, True)
    assert graphs == [FORWARD] * len(backwards) + backwards
    assert warned == []


@pytest.mark.parametrize(
    ("is_symmetric", "number", "options"), [(False, 4, {}), (True, 2, {"sequence_parallel": False})], ids=str
)
def test_those_that_are_not_are_said(pool, is_symmetric, number, options) -> None:
    found, warned = pool(2)(ran, MODELS["litgpt"], 1, 16, is_symmetric, **options)
    assert not any(name in graph for name in (GATHER, SUM) for graph in found)
    assert any(f"none of the {number} collectives" in message for message in warned)


def differences(*args: Any) -> dict[str, float]:
    with symmetric():
        return compare(*args)


@pytest.mark.parametrize(("name", "batch"), [("litgpt", 1), ("llama", 2), ("biases", 2)])
def test_equals_one_device(pool, name, batch) -> None:
    tokens = torch.randint(90, (batch, 16), generator=torch.Generator().manual_seed(0))
    parallelize_fn = fabric_tp.auto(compile=True, overlap=True)
    report = Report(pool(2)(differences, MODELS[name], parallelize_fn, tokens, next_token_loss, (1, 2), 2, None))
    assert report.equal, str(report)
