"""Blocks under the compiler: each is one graph of plain tensors, activation checkpointing included."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
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


def compile_block(
    block: nn.Module, policy: Callable[..., CheckpointPolicy] | None = None, options: dict[str, Any] | None = None
) -> None:
    """Compile the forward of a block.

    Args:
        policy: Of each operator: whether its result is kept for the backward. By default the compiler decides.
        options: Of ``torch.compile``.
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
    block.compiled = torch.compile(forward, options=options or None)  # type: ignore[assignment]


def own_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """That of a block whose forward is compiled, without the compiler."""
    return super(_CompiledBlock, block).forward(*args, **kwargs)  # type: ignore[misc]


@cache
def for_each_shape(mode: str | None = None) -> Callable[..., Any]:
    """:func:`own_forward`, compiled for each shape by itself; ``mode`` as in ``torch.compile``."""
    return torch.compile(own_forward, dynamic=False, mode=mode)


def compiled_blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _CompiledBlock)]


@contextmanager
def computed_by(blocks: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Within it ``forward(block, ...)``, compiled or not, takes the place of the forward of each block."""
    before = [(block, type(block), block.__dict__.get("compiled")) for block in blocks]
    try:
        for block, own, compiled in before:
            block.__class__ = own if compiled else mixed(_CompiledBlock, own)
            block.compiled = forward  # type: ignore[assignment]
        yield
    finally:
        for block, own, compiled in before:
            block.__class__ = own
            block.__dict__.pop("compiled", None)
            if compiled:
                block.compiled = compiled
