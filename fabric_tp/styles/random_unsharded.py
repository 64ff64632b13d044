from __future__ import annotations

from fabric_tp.styles.random_module import RandomModule
from fabric_tp.styles.style import LocalModule
from fabric_tp.styles.unsharded import Unsharded


class _RandomUnshardedModule(RandomModule, LocalModule):
    pass


class RandomUnsharded(Unsharded):
    """As :class:`RandomHeads`, for an attention module that every rank computes whole, with the same masks.

    Args:
        layout: As in :class:`Unsharded`.
        reads: As in :class:`Unsharded`.

    ===============  ===========  =========  ===========  ==========  ==========
    layout           x            inside     y            forward     backward
    ===============  ===========  =========  ===========  ==========  ==========
    ``"replicate"``  (b, s, h)    (b, s, h)  (b, s, h)
    ``"sequence"``   (b, s/t, h)  (b, s, h)  (b, s/t, h)  all-gather  all-gather
    ===============  ===========  =========  ===========  ==========  ==========

    Raises:
        ValueError: When it is called in training: nobody told it the seed.

    Example::

        plan = {"attention": RandomUnsharded("sequence"), "attention.qkv": Replicated()}
    """

    module_class = _RandomUnshardedModule
