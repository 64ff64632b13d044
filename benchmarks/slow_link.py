"""A slow cable between the ranks of a process: it sleeps until the bytes of a collective would have come through.

For where network namespaces are not allowed. Collectives themselves still run over the machine's own memory; a wait
lasts until what was issued before has gone over the cable one after the other.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fabric_tp._torch import OperationMode
from fabric_tp.measure.communication import CollectiveCounter

AWAITED_LATER = ("_allgather_base_", "alltoall_base_")


class SlowLink(OperationMode):
    """To be entered after the counter of the same mesh.

    Args:
        counter: Counts the collectives of the ranks.
        bandwidth: Bytes a second that each rank can send.
    """

    def __init__(self, counter: CollectiveCounter, bandwidth: float) -> None:
        super().__init__()
        self._counter, self._bandwidth = counter, bandwidth
        self._free = 0.0
        self._arrives: dict[int, float] = {}

    def see(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        issued = len(self._counter.collectives)
        result = operation(*args, **kwargs)
        if operation._schema.name == "_c10d_functional::wait_tensor":
            arrives = self._arrives.pop(args[0].untyped_storage()._cdata, 0.0)
            time.sleep(max(0.0, arrives - time.perf_counter()))
        elif len(self._counter.collectives) > issued:
            sent = self._counter.collectives[-1].sent
            self._free = max(self._free, time.perf_counter()) + sent / self._bandwidth
            if operation.namespace == "c10d" and not operation.__name__.startswith(AWAITED_LATER):
                time.sleep(max(0.0, self._free - time.perf_counter()))
            else:
                made = result if isinstance(result, Tensor) else args[0]
                self._arrives[made.untyped_storage()._cdata] = self._free
        return result


def slow_link(mesh: DeviceMesh, bandwidth: float) -> tuple[CollectiveCounter, SlowLink]:
    """The two contexts, in this order."""
    counter = CollectiveCounter(mesh)
    return counter, SlowLink(counter, bandwidth)
