"""A copy of a state that stays as it was while the training changes the state."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor


class Staging:
    """Copies nested dicts and lists of tensors to memory of the CPU, pinned if there are GPUs, and always the same.

    ``torch.distributed.checkpoint``'s stager makes the first copy. What it takes for each DTensor, a new one with a
    copied mesh, would be most of the time on small shards, so that later copies go into the tensors of the first.
    """

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._layout: Any = None
        self._copy: Any = None

    @torch.no_grad()
    def __call__(self, state: dict[str, Any]) -> dict[str, Any]:
        """Of the same keys; nobody may use the copy before this one any more."""
        if self._layout == (layout := _layout(state)):
            self._copy = _copied(state, self._copy)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        else:
            self._layout, self._copy = layout, self._stager.stage(state)
        return self._copy


def _layout(state: Any) -> Any:
    """What has to be equal for one state's copy to be written into another's."""
    if isinstance(state, dict):
        return {key: _layout(each) for key, each in state.items()}
    if isinstance(state, list):
        return [_layout(each) for each in state]
    if isinstance(state, DTensor):
        return state.shape, state.dtype, state.placements, state.device_mesh
    if isinstance(state, Tensor):
        return state.shape, state.dtype
    return None


def _copied(state: Any, into: Any) -> Any:
    if isinstance(state, dict):
        return {key: _copied(each, into[key]) for key, each in state.items()}
    if isinstance(state, list):
        return [_copied(each, other) for each, other in zip(state, into, strict=True)]
    if isinstance(state, Tensor):
        _local(into).copy_(_local(state), non_blocking=True)
        return into
    return copy.deepcopy(state)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
