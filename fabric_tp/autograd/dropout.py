"""Dropout masks that are a function of where an element is, and not of what was drawn before it.

An element's bits are a hash of a key, its sample's number and its place in the sample. So any rank can compute the
part of a mask that it needs, as often as it needs it, and nothing is kept for the backward. The idea is that of
counter-based generators: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).

Each row (all dimensions but the last) gets 64 bits from SplitMix64, whose finaliser is applied once per dimension
(Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014). Two multiplications and a shift between them,
those of lowbias32 (Wellons, "Prospecting for Hash Functions", 2018; https://nullprogram.com/blog/2018/07/31/), then mix
them with the last dimension's: few passes over the elements, in 32 bits. All of it wraps around, and so CPU and GPU
compute the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fabric_tp.autograd.recompute import Recomputable, producer_of, recompute

CHUNK = {"cpu": 2**17, "cuda": 2**25}
"""Elements whose bits are computed at once: they are to stay in a CPU's cache, and to fill a GPU."""


@dataclass(frozen=True)
class Mask:
    """The elements of a local tensor that are dropped."""

    rate: float
    """Share of the elements that is dropped, between 0 and 1."""
    key: int
    """64 bits; masks of different keys have nothing in common."""
    first: int = 0
    """Number of the sample in row 0 of dim 0."""
    stride: int = 1
    """Step from the number of one sample to that of the next."""
    shard_dim: int | None = None
    """The dimension of which this rank has a part, if there is one."""
    shard_rank: int = 0
    """Number of the part: all are equally long."""

    def offset(self, shape: torch.Size, dim: int) -> int:
        return self.shard_rank * shape[dim] if dim == self.shard_dim else 0


def dropout(x: Tensor, mask: Mask, *, inplace: bool = False) -> Tensor:
    """``x`` with the mask's elements set to zero and all others divided by ``1 - rate``.

    Keeps nothing for the backward, which computes the mask again. Where ``x`` can be recomputed, so can the result.

    Args:
        x: ``(n, ...)``.
        mask: The elements to drop, of a tensor of this shape.
        inplace: Write into ``x`` and return it.
    """
    producer = None if inplace else producer_of(x)
    return _Dropout.apply(x, mask, inplace) if producer is None else _RecomputableDropout.apply(x, mask, producer)


def dropped(shape: torch.Size, mask: Mask, device: torch.device) -> Tensor:
    """Booleans of this shape ``(n, ...)``: whether each element is dropped."""
    rows = _row_keys(shape, mask, device)
    return torch.cat([part for _, part in _dropped(rows, _last_keys(shape, mask, device), mask.rate)]).view(shape)


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask, inplace: bool) -> Tensor:
        ctx.mask = mask
        if not inplace:
            return _drop(x, mask)
        ctx.mark_dirty(x)
        return x.copy_(_drop(x, mask))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Dropout.apply(grad, ctx.mask, False), None, None


class _RecomputableDropout(Recomputable):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask, producer: Any) -> Tensor:
        ctx.mask, ctx.producer = mask, producer
        y = _drop(x, mask)
        ctx.version = y._version
        return y

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        return _drop(recompute(ctx.producer), ctx.mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Dropout.apply(grad, ctx.mask, False), None, None


def _drop(x: Tensor, mask: Mask) -> Tensor:
    if mask.rate >= 1:
        return torch.zeros_like(x)
    y = x.contiguous() * (1 / (1 - mask.rate))
    if not y.numel():
        return y
    flat = y.view(-1, x.shape[-1] if x.dim() > 1 else 1)
    for rows, part in _dropped(_row_keys(x.shape, mask, x.device), _last_keys(x.shape, mask, x.device), mask.rate):
        flat[rows].masked_fill_(part, 0)
    return y


def _dropped(rows: Tensor, last: Tensor, rate: float) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows, and whether their elements are dropped; from the rows' keys (n, 2) and the last dim's (m,)."""
    threshold = min(round(rate * 2**32), 2**32 - 1) - 2**31
    step = max(1, CHUNK.get(rows.device.type, CHUNK["cuda"]) // len(last))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        bits = rows[part, :1] ^ last
        bits *= 0x7FEB352D
        shifted = bits >> 15
        shifted &= 0x1FFFF  # the shift is an arithmetic one
        bits ^= shifted
        bits ^= rows[part, 1:]
        bits *= 0x846CA68B - 2**32
        yield part, bits < threshold  # decided by the highest bits, which depend on all others


def _row_keys(shape: torch.Size, mask: Mask, device: torch.device) -> Tensor:
    """Two numbers of 32 bits (n, 2) for each row, of which all dimensions but the last are flattened."""
    samples = torch.arange(shape[0], device=device)
    keys = _mix(samples.mul_(mask.stride).add_(mask.first), _signed(mask.key))
    for dim in range(1, len(shape) - 1):
        start = mask.offset(shape, dim)
        places = torch.arange(start, start + shape[dim], device=device)
        keys = _mix(places, keys.unsqueeze(-1))
    return keys.reshape(-1, 1).view(torch.int32)


def _last_keys(shape: torch.Size, mask: Mask, device: torch.device) -> Tensor:
    if len(shape) < 2:
        return torch.zeros(1, dtype=torch.int32, device=device)
    start = mask.offset(shape, len(shape) - 1)
    places = torch.arange(start, start + shape[-1], device=device)
    return _mix(places, 0).unsqueeze(-1).view(torch.int32)[:, 0]


def _mix(index: Tensor, key: Tensor | int) -> Tensor:
    """64 bits for each index, by SplitMix64 from the state ``key``: its ``index``-th number."""
    bits = (index + 1) * _signed(0x9E3779B97F4A7C15) + key
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return bits ^ ((bits >> 31) & (2**33 - 1))


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits
