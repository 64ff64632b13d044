"""Parameters put together for one forward, of which the backward keeps no copy.

A module that was written for one whole parameter gets its parts put together. What autograd then saves are views of
that copy: it would stay in memory, next to the parts, until the backward. So its memory is given back after the
forward, and filled again when the gradient of the forward's output arrives, before anything that needs it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fabric_tp import _torch


class Concatenation:
    """``torch.cat(parts, dim)``.

    Args:
        parts: Tensors that have the same values in the backward.
        dim: Along which they are put together.
    """

    def __init__(self, parts: Sequence[Tensor], dim: int) -> None:
        self.parts, self.dim = list(parts), dim
        self.whole = torch.cat(self.parts, dim)

    def free_until_backward(self, output: object) -> None:
        """Give the memory back after the forward whose output this is; nothing else may have a gradient through it."""
        if torch.compiler.is_compiling() or _torch.is_fake(self.whole) or self.whole.is_meta:
            return
        if _torch.current_backward() >= 0:
            return  # activation checkpointing computes it again for a backward that is already here
        nodes = {leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None}
        if not nodes:
            return  # nothing is saved: the memory goes with the last reference to it
        for node in nodes:
            node.register_prehook(self._fill)
        self.whole.untyped_storage().resize_(0)

    @torch.no_grad()
    def _fill(self, grads: object) -> None:
        storage = self.whole.untyped_storage()
        if storage.nbytes() == 0:
            storage.resize_(self.whole.numel() * self.whole.element_size())
            # Not self.whole: to autograd it has not changed.
            torch.cat([part.detach() for part in self.parts], self.dim, out=self.whole.data)
