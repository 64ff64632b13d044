"""Which backward of several reduces gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import nn
from torch.distributed.fsdp import FSDPModule


class GradientSync(_BackwardSyncControl):
    """Leaves gradient synchronisation as it was on entry; Fabric's own leaves it off after ``enabled=False``."""

    def __init__(self) -> None:
        self._synchronises: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        before = self._synchronises.get(module, True)
        self._set(module, not enabled)
        try:
            yield
        finally:
            self._set(module, before)

    def _set(self, module: nn.Module, synchronises: bool) -> None:
        self._synchronises[module] = synchronises
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_requires_gradient_sync(synchronises, recurse=False)
