"""What runs within a context: sizes of results, matrix products, collectives."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

AG, RS, AR = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"
ON_CPU = {"_allgather_base_": AG, "alltoall_base_": RS}


class Watch(TorchDispatchMode):
    """The largest result of any operation, and multiplications in matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.multiplications = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if type(leaf) is Tensor]
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tensors]
        self.largest = max(self.largest, *sizes, 0, 0)
        if operation.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
            left = [x for x in args if isinstance(x, Tensor) and x.dim() > 1][-2]
            self.multiplications += result.numel() * left.shape[-1]
        return result


class Collectives(TorchDispatchMode):
    """Their number by name. CommDebugMode would set a full backward hook on the model, and so get real logits."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if name in ON_CPU:
            self.counts[ON_CPU[name]] += 1
        elif operation.namespace == "c10d":
            raise AssertionError(f"{name} is not counted")
        if operation.namespace == "_c10d_functional" and name != "wait_tensor":
            self.counts[name] += 1
        return operation(*args, **(kwargs or {}))
