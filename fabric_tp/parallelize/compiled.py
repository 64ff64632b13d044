"""Blocks under the compiler: each is one graph of plain tensors, activation checkpointing included."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fabric_tp import _torch
from fabric_tp.styles.style import LocalModule, mixed, put_back


class _CompiledBlock(nn.Module):
    """Mixed into the class of a block: its forward is compiled, for this rank's plain local tensors.

    The compiler sees neither DTensors nor modules that change.
    """

    compiled: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        held = [each for module in self.modules() if isinstance(module, LocalModule) for each in module.take_local()]
        try:
            return self.compiled(self, *args, **kwargs)
        finally:
            put_back(held)


def compile_block(block: nn.Module, policy: Callable[..., CheckpointPolicy] | None = None) -> None:
    """Compile the forward of a block.

    Args:
        policy: Of each operator: whether its result is kept for the backward. By default the compiler decides.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        if not _torch.is_traced():  # the block is not one graph, and the policy would not see all operators
            return nullcontext(), nullcontext()
        return create_selective_checkpoint_contexts(policy)  # type: ignore[arg-type]

    def forward(block: _CompiledBlock, *args: Any, **kwargs: Any) -> Any:
        own: Callable[..., Any] = super(_CompiledBlock, block).forward  # type: ignore[misc]
        if policy is None or not torch.is_grad_enabled():
            return own(*args, **kwargs)
        return checkpoint(own, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    if policy is not None:
        _torch.silence_compiler_on_checkpoints()
    block.__class__ = mixed(_CompiledBlock, type(block))
    block.compiled = torch.compile(forward)  # type: ignore[assignment]
