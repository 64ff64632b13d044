from __future__ import annotations

from fabric_tp.styles.random_module import RandomModule
from fabric_tp.styles.unsharded import Unsharded


class RandomUnsharded(Unsharded):
    """As :class:`RandomHeads`, for an attention module that every rank computes whole, with the same masks."""

    module_class = RandomModule
