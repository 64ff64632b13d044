"""Which dropouts there are in a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fabric_tp.plan.modules import is_within


@dataclass(frozen=True)
class Dropouts:
    """The ``nn.Dropout`` modules within a module, by their names."""

    rates: dict[str, float] = field(default_factory=dict)
    in_adapters: frozenset[str] = frozenset()

    def outside(self, *names: str) -> Dropouts:
        """Those that are not in these children."""
        return self._of(lambda path: not any(is_within(path, name) for name in names))

    def within(self, *names: str) -> Dropouts:
        return self._of(lambda path: any(is_within(path, name) for name in names))

    def _of(self, chosen: Callable[[str], bool]) -> Dropouts:
        rates = {path: rate for path, rate in self.rates.items() if chosen(path)}
        return Dropouts(rates, self.in_adapters)
