"""Activation checkpointing and compilation, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fabric_tp import _torch
from fabric_tp.autograd.collectives import Group
from fabric_tp.autograd.kept_reductions import kept_reductions
from fabric_tp.autograd.padding import Padding
from fabric_tp.parallelize.compiled import compile_block
from fabric_tp.parallelize.fused_collectives import fused_collectives
from fabric_tp.parallelize.options import BlockOptions
from fabric_tp.parallelize.overlapped import overlap_halves
from fabric_tp.styles.style import LocalModule


def checkpoint_or_compile(
    blocks: Iterable[nn.Module], options: BlockOptions, mesh: DeviceMesh, token_wise: Sequence[nn.Module] = ()
) -> None:
    """Let each block be computed again in the backward, or be compiled, or be overlapped, as the options say.

    Args:
        token_wise: MLPs in the blocks, as for :func:`overlap_halves`.
    """
    how = fused_collectives(Group.of(mesh), mesh.device_type) if options.overlap and options.compile else {}
    for block in blocks:
        if options.overlap and not options.compile:
            overlap_halves(block, token_wise)
        if options.compile:
            compile_block(block, POLICIES[options.activation_checkpointing], how)
        elif options.activation_checkpointing != "none":
            _torch.checkpoint(block, context_fn=partial(CONTEXTS[options.activation_checkpointing], _padding(block)))


Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]
"""Of the forward of a block, and of when it is computed again."""


def _padding(block: nn.Module) -> Padding:
    inner = (module.parallelized.padding for module in block.modules() if isinstance(module, LocalModule))
    return next(inner, None) or Padding()


def _keep_input(padding: Padding) -> Contexts:
    return nullcontext(), padding.recomputation()


def _keep_expensive(padding: Padding) -> Contexts:
    """Keep the results of attention, and those of reductions together with the products before them."""
    forward, recomputation = kept_reductions()
    attention = create_selective_checkpoint_contexts(_keep_attention)
    return _Both(attention[0], forward), _Both(attention[1], recomputation, padding.recomputation())


CONTEXTS = {"full": _keep_input, "selective": _keep_expensive}


def _keep_nothing(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = "scaled_dot_product" in str(operation)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention_and_reductions(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in _torch.COLLECTIVE_RESULTS:
        return CheckpointPolicy.MUST_SAVE
    return _keep_attention(context, operation)


POLICIES = {"none": None, "full": _keep_nothing, "selective": _keep_attention_and_reductions}
"""What is kept by a checkpoint that the compiler traces: it sees operators only."""


class _Both(AbstractContextManager[None]):
    """Two contexts as one; unlike a generator's, it may be entered again."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        self.contexts = contexts

    def __enter__(self) -> None:
        self.stack = ExitStack()
        for context in self.contexts:
            self.stack.enter_context(context)

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)
