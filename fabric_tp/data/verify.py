"""Find out whether the ranks of a tensor-parallel group compute on the same inputs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.distributed.tensor import DTensor

from fabric_tp.data.groups import gather_numbers, gather_objects

WAY_OUT = (
    "All ranks of a tensor-parallel group must get the same inputs: let nothing in the data depend on the rank, on the"
    " order of a set or of files, or on an unseeded random state; or pass broadcast_inputs=True to the strategy, so"
    " that one rank loads and the others receive."
)


@dataclass(frozen=True, order=True)
class Leaf:
    """What a batch has at one key path: in words, and as a digest of type, shape and content."""

    kind: str
    digest: bytes


Leaves = dict[str, Leaf]
WHAT_THE_MODEL_GETS = "the model's inputs"


def fingerprint(batch: Any) -> Leaves:
    """The leaves of a nested batch by key path, such as ``['tokens'][0]``.

    Tensors (on the CPU after this) and arrays count with dtype, shape and bytes, numbers, strings and None with their
    value, and objects of other types with the type's name only.
    """
    return dict(_leaves(batch, ""))


class Verifier:
    """Compares inputs at the model's forward, the one place that all ranks reach in step.

    Dataloaders only note what they yield. So a rank may look at a batch that the others do not, and nothing waits.

    Args:
        every: Which batches of a dataloader's pass to note: the first, and each so many after it.
        tensor_parallel_group: Ranks that get the same inputs, on the CPU; None if there are none.
        data_parallel_group: Ranks that get different inputs, on the CPU; None if there are none.
    """

    def __init__(
        self,
        every: int,
        tensor_parallel_group: ProcessGroup | None,
        data_parallel_group: ProcessGroup | None,
    ) -> None:
        self._every, self._group, self._replicas = every, tensor_parallel_group, data_parallel_group
        self._noted: dict[str, Leaves] = {}
        self._latest: dict[int, str] = {}
        self._loaded = False
        self._by_hand = 0
        self._first = True

    def note(self, loader: int, epoch: int, index: int, batch: Any) -> None:
        """A dataloader is about to yield a batch."""
        self._loaded = True
        self._latest[loader] = name = f"batch {index} of epoch {epoch} of dataloader {loader}"
        if index % self._every == 0:
            self._noted[name] = fingerprint(batch)

    def check(self, inputs: Any) -> None:
        """Compare what has been noted since the last call; collective in the tensor-parallel group.

        Args:
            inputs: The forward's own arguments, which count if no dataloader has yielded anything.

        Raises:
            ValueError: On every rank of the group: ranks were given different inputs.
        """
        noted = self._noted
        if not self._loaded:
            if self._by_hand % self._every == 0:
                noted = {WHAT_THE_MODEL_GETS: fingerprint(inputs)}
            self._by_hand += 1
        self._noted, self._loaded = {}, False
        digest = _digest(noted)
        if self._group is not None and len({tuple(each) for each in gather_numbers(digest, self._group)}) > 1:
            self._explain(noted, inputs, self._group)
        if self._first and self._replicas is not None:
            _warn_if_equal(_digest(noted), bool(noted), self._replicas)
        self._first = False

    def _explain(self, noted: Mapping[str, Leaves], inputs: Any, group: ProcessGroup) -> None:
        """Raise, unless ranks have only looked at different batches and compute on the same."""
        ranks = get_process_group_ranks(group)
        noted_by, latest_by = zip(*gather_objects((noted, list(self._latest.values())), group), strict=True)
        for name in sorted(set.intersection(*map(set, noted_by))):
            if difference := _difference([each[name] for each in noted_by], ranks):
                raise ValueError(
                    f"Ranks {ranks} of one tensor-parallel group differ in {name}: {difference}. {WAY_OUT}"
                )
        if difference := _difference(gather_objects(fingerprint(inputs), group), ranks):
            loaded = "; ".join(
                f"{', '.join(latest) or 'nothing'} on rank {rank}"
                for rank, latest in zip(ranks, latest_by, strict=True)
            )
            raise ValueError(
                f"Ranks {ranks} of one tensor-parallel group differ in {WHAT_THE_MODEL_GETS}: {difference}. What their"
                f" dataloaders have yielded last is {loaded}. {WAY_OUT}"
            )


def _leaves(item: Any, path: str) -> Iterator[tuple[str, Leaf]]:
    if isinstance(item, Tensor):
        yield path, _tensor_leaf(item)
    elif isinstance(item, np.ndarray) and not item.dtype.hasobject:
        yield path, _leaf(f"{item.dtype} array {item.shape}", np.ascontiguousarray(item).reshape(-1).view(np.uint8))
    elif isinstance(item, (str, bytes, int, float, complex, bool, np.generic, torch.dtype)) or item is None:
        yield path, _leaf(_shortened(repr(item)), repr(item).encode())
    elif isinstance(item, Mapping):
        for key in item:
            yield from _leaves(item[key], f"{path}[{key!r}]")
    elif isinstance(item, (list, tuple)):
        yield f"{path}<length>", _leaf(f"{len(item)} items", b"")
        for index, each in enumerate(item):
            yield from _leaves(each, f"{path}[{index}]")
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        for field in dataclasses.fields(item):
            yield from _leaves(getattr(item, field.name), f"{path}.{field.name}")
    else:
        yield path, _leaf(f"a {type(item).__qualname__}", b"")


def _tensor_leaf(tensor: Tensor) -> Leaf:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return _leaf(kind, b"")  # its content is not plain bytes
    content = tensor.detach().as_subclass(Tensor).cpu().contiguous().reshape(-1).view(torch.uint8)
    return _leaf(kind, content.numpy())


def _leaf(kind: str, content: Any) -> Leaf:
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    digest.update(content)
    return Leaf(kind, digest.digest())


def _digest(noted: Mapping[str, Leaves]) -> tuple[int, int]:
    """Two numbers that stand for everything noted."""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(noted):
        for path, leaf in sorted(noted[key].items()):
            digest.update(f"{key}{path}".encode() + leaf.digest)
    content = digest.digest()
    return int.from_bytes(content[:8], "little") >> 1, int.from_bytes(content[8:], "little") >> 1


def _difference(every: list[Leaves], ranks: list[int]) -> str:
    """Where the ranks' leaves differ first, and who has what; empty where they do not."""
    paths = list(dict.fromkeys(path for leaves in every for path in leaves))
    for path in paths:
        found = [leaves.get(path) for leaves in every]
        if len(set(found)) > 1:
            holders: dict[Leaf | None, list[int]] = {}
            for rank, leaf in zip(ranks, found, strict=True):
                holders.setdefault(leaf, []).append(rank)
            shown = ", ".join(f"{leaf.kind if leaf else 'nothing'} on ranks {those}" for leaf, those in holders.items())
            return f"at {path.removesuffix('<length>') or 'the batch itself'} there is {shown}" + _same_kind(found)
    return ""


def _same_kind(found: list[Leaf | None]) -> str:
    return ", of different content" if len({leaf and leaf.kind for leaf in found}) == 1 else ""


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _warn_if_equal(digest: tuple[int, int], anything: bool, replicas: ProcessGroup) -> None:
    numbers = gather_numbers([anything, *digest], replicas)
    if all(each[0] for each in numbers) and len({tuple(each) for each in numbers}) == 1:
        rank_zero_warn(
            f"All {replicas.size()} data-parallel ranks got the very same first batch, so they all train on the same"
            " data. An IterableDataset must split its samples by the data-parallel rank"
            " (fabric.strategy.distributed_sampler_kwargs), since nothing else does."
        )
