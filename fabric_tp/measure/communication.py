"""Collectives that a step issues, and the bytes that each rank sends for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from fabric_tp._torch import OperationMode, group_name

CollectiveKind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "broadcast"]

_KINDS: Mapping[str, CollectiveKind] = {
    "all_gather": "all-gather",
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_reduce": "all-reduce",
    "allreduce": "all-reduce",
    "alltoall_base": "reduce-scatter",  # is issued as one on the CPU, where each rank adds up what it gets
    "all_to_all": "all-to-all",
    "alltoall": "all-to-all",
    "broadcast": "broadcast",
}


@dataclass(frozen=True)
class Collective:
    kind: CollectiveKind
    axis: str
    """Name of the mesh's dimension; ``"mesh"`` for all of its ranks."""
    size: int
    """Ranks that take part."""
    nbytes: int
    """Of the whole: what a gather returns, a scatter takes, a reduction does both."""
    phase: str
    """What was running."""

    @property
    def sent(self) -> int:
        """Bytes that each rank sends; see :func:`ring_bytes`."""
        return ring_bytes(self.kind, self.nbytes, self.size)

    def extended(self, other: Collective, times: int) -> Collective:
        """With the bytes that ``other`` has more, so often.

        Raises:
            ValueError: ``other`` is not the same collective of more.
        """
        if replace(other, nbytes=self.nbytes) != self:
            raise ValueError(f"{other} is not {self} of more.")
        return replace(self, nbytes=self.nbytes + times * (other.nbytes - self.nbytes))


def ring_bytes(kind: CollectiveKind, nbytes: int, size: int) -> int:
    """Bytes that each of ``size`` ranks sends in a ring, for ``nbytes`` as in :class:`Collective`.

    An all-reduce is a reduce-scatter and an all-gather (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms
    for clusters of workstations", 2009).
    """
    if size < 2:
        return 0
    return nbytes * (size - 1) * (2 if kind == "all-reduce" else 1) // size


class CollectiveCounter(OperationMode):
    """Records each collective that is issued within this context, other than those of one rank with itself.

    Args:
        mesh: Whose dimensions the collectives are to be told apart by; None if there are none.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.phase = ""
        """What is running now."""
        self._axes: dict[str, tuple[str, int]] = {}
        self._whole = 1 if mesh is None else mesh.size()
        if mesh is not None:
            names = mesh.mesh_dim_names or tuple(map(str, range(mesh.ndim)))
            self._axes = {
                mesh.get_group(index).group_name: (names[index], mesh.size(index)) for index in range(mesh.ndim)
            }

    def see(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = operation(*args, **kwargs)
        if "c10d" in operation.namespace:
            kind = next((kind for part, kind in _KINDS.items() if part in operation.__name__), None)
            if kind is not None:
                arguments = [*args, *kwargs.values()]
                self._record(kind, arguments, result)
        return result

    def _record(self, kind: CollectiveKind, arguments: list[Any], result: Any) -> None:
        name = next((name for argument in reversed(arguments) if (name := group_name(argument)) is not None), "")
        axis, size = self._axes.get(name) or ("mesh", self._whole)
        if size > 1:
            nbytes = max(_nbytes(arguments), _nbytes(result))
            self.collectives.append(Collective(kind, axis, size, nbytes, self.phase))


def _nbytes(values: Any) -> int:
    """Bytes of the larger of several lists of tensors, or of several tensors."""
    sizes = [
        sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        for value in (values if isinstance(values, (list, tuple)) else [values])
    ]
    return max(sizes, default=0)
