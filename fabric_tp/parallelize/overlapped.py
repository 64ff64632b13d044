"""Blocks, or whole models, that compute one half of their batch while the collectives of the other run."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fabric_tp.autograd.collectives import SEQUENCE_DIM
from fabric_tp.autograd.halves import current_half, take_turns
from fabric_tp.autograd.recompute import part_of
from fabric_tp.loss.deferred import DeferredLogits
from fabric_tp.parallelize.fsdp import is_sharded
from fabric_tp.parallelize.options import BlockOptions
from fabric_tp.styles.layout import padding_of
from fabric_tp.styles.prepare_input import PrepareInput
from fabric_tp.styles.random_module import has_followers
from fabric_tp.styles.style import LocalModule, Parallelized, mixed, put_back

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""Arguments and results that are the same for both halves."""


class _OverlappedBlock(nn.Module):
    """Mixed into the class of a block or a model: in training its own forward runs on two halves in turns.

    Within FSDP2's hooks, which gather the block's parameters once, and within activation checkpointing.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = super().forward
        batch = _batch(args, kwargs)
        if batch is None or not torch.is_grad_enabled() or self.has_numbers_per_head(args, kwargs):
            return own(*args, **kwargs)
        sizes = _halved(batch)
        parts = [_part((args, kwargs), batch, first, size) for first, size in zip((0, sizes[0]), sizes, strict=True)]
        return _joined(_in_turns(self, lambda i: own(*parts[i][0], **parts[i][1]), sizes), sizes)

    def has_numbers_per_head(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether an argument is ``(n, s, s)`` or ``(b * n, s, s)``, such as ALiBi's biases."""
        styles = (module.parallelized.style for module in self.modules() if isinstance(module, LocalModule))
        names = {name for style in styles for name in getattr(style, "per_head_arguments", ())}
        if not names:
            return False
        given = {**inspect.signature(super().forward).bind_partial(*args, **kwargs).arguments, **kwargs}
        return any(isinstance(given.get(name), Tensor) and given[name].dim() == 3 for name in names)


class _OverlappedTokens(nn.Module):
    """Mixed into the class of an MLP that computes each token by itself: in training a batch of one, which has no half,
    is computed in two halves of its tokens."""

    parallelized: Parallelized[Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = super().forward
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        is_alone = isinstance(x, Tensor) and x.dim() == 3 and len(x) == 1 and x.shape[SEQUENCE_DIM] > 1
        if not is_alone or current_half() or padding_of(self.parallelized) or not torch.is_grad_enabled():
            return own(*args, **kwargs)
        sizes = _halved(x.shape[SEQUENCE_DIM])
        parts = [part_of(x, SEQUENCE_DIM, first, size) for first, size in zip((0, sizes[0]), sizes, strict=True)]
        return torch.cat(_in_turns(self, lambda i: own(parts[i]), sizes), SEQUENCE_DIM)


def goes_through_in_halves(options: BlockOptions, data_parallel: DeviceMesh | None) -> bool:
    """Whether halves may go through all of a model, and not only through each block.

    Not if FSDP2 gathers a block for one forward, or a checkpoint's forward is something that the other half must not
    see.
    """
    plain = options.activation_checkpointing == "none" and not options.compile
    return options.overlap and plain and not is_sharded(data_parallel, options)


def overlap_halves(block: nn.Module, token_wise: Iterable[nn.Module] = ()) -> None:
    """Compute the block, or a model, so, and those of its MLPs that are known to treat each token by itself."""
    block.__class__ = mixed(_OverlappedBlock, type(block))
    inside = set(block.modules())
    for mlp in token_wise:
        gathers = isinstance(mlp, LocalModule) and type(mlp.parallelized.style) is PrepareInput
        if mlp in inside and gathers and not has_followers(mlp):  # whose masks are those of samples
            mlp.__class__ = mixed(_OverlappedTokens, type(mlp))


def _halved(size: int) -> list[int]:
    return [size - size // 2, size // 2]


def _in_turns(module: nn.Module, function: Callable[[int], Any], sizes: Sequence[int]) -> list[Any]:
    # A module's forward puts local tensors in its parameters' place, and the halves are in the same module at once.
    held = [each for inner in module.modules() if isinstance(inner, LocalModule) for each in inner.take_local()]
    try:
        return take_turns(function, sizes)
    finally:
        put_back(held)


def _batch(args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
    """How many samples the block is given; None if they cannot be halved.

    Its first tensor has them. Another one whose first dimension is as long may have something for each sample, ``(b,)``
    or ``(b, s)``, or be positions or a mask for all, ``(s,)`` or ``(s, s)``: where b is s, nobody knows.
    """
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *PLAIN))}
    if others:
        warnings.warn(
            f"overlap=True has no effect on blocks that are given a {' and a '.join(sorted(others))}, which cannot be"
            " halved. Transformers' models give out no cache if they are called with use_cache=False.",
            stacklevel=2,
        )
        return None
    if not tensors or tensors[0].dim() < 2 or len(tensors[0]) < 2:
        return None
    batch = len(tensors[0])
    others_like_it = [tensor.shape[:2] for tensor in tensors[1:] if _may_have_samples(tensor)]
    unclear = (batch, batch) in others_like_it or ((batch,) in others_like_it and batch in tensors[0].shape[1:])
    return None if unclear else batch


def _may_have_samples(tensor: Tensor) -> bool:
    """Tables of positions, ``(s, d)``, are of floating point."""
    is_table = tensor.dim() == 2 and (tensor.is_floating_point() or tensor.is_complex())
    return tensor.dim() > 0 and not is_table


def _part(arguments: Any, batch: int, first: int, size: int) -> Any:
    is_first = True

    def part(leaf: Any) -> Any:
        nonlocal is_first
        if not isinstance(leaf, Tensor):
            return leaf
        has_samples, is_first = is_first or _may_have_samples(leaf), False
        return leaf.narrow(0, first, size) if has_samples and leaf.shape[0] == batch else leaf

    return tree_map(part, arguments)


def _together(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    if isinstance(first, DeferredLogits):
        return DeferredLogits.of_samples(parts)
    if not isinstance(first, DTensor):
        return torch.cat(list(parts))
    shape = torch.Size((sum(map(len, parts)), *first.shape[1:]))
    stride = tuple(shape[dim + 1 :].numel() for dim in range(len(shape)))
    local = torch.cat([part.to_local(grad_placements=first.placements) for part in parts])  # type: ignore[attr-defined]
    return DTensor.from_local(local, first.device_mesh, first.placements, run_check=False, shape=shape, stride=stride)


def _joined(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Raises ValueError for a tensor that is not of samples, such as a router's loss: it would be that of a half."""
    leaves, structure = zip(*map(tree_flatten, outputs), strict=True)
    joined: list[Any] = []
    for parts in zip(*leaves, strict=True):
        if isinstance(parts[0], PLAIN) and all(part == parts[0] for part in parts):
            joined.append(parts[0])
        elif all(isinstance(part, Tensor) for part in parts) and all(
            part.dim() and len(part) == size for part, size in zip(parts, sizes, strict=True)
        ):
            joined.append(_together(parts))
        else:
            what = f"tensor {tuple(parts[0].shape)}" if isinstance(parts[0], Tensor) else type(parts[0]).__name__
            raise ValueError(
                f"overlap=True halves the batch of each block, and one returns a {what} without a dimension of"
                f" {sizes[0]} samples. Leave overlap out for this model."
            )
    return tree_unflatten(joined, structure[0])
