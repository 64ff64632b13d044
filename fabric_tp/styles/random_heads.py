from __future__ import annotations

from fabric_tp.styles.attention_heads import ShardHeads
from fabric_tp.styles.random_module import RandomModule


class _RandomHeadsModule(RandomModule):
    by_rank = True


class RandomHeads(ShardHeads):
    """An attention module with dropout inside its kernel, which draws from torch's generator.

    It draws from a state of its own, made of the seed, the call and the rank: other masks on other ranks, other
    samples and in other calls, and the same when activations are computed again. Unlike :class:`Dropout`'s they do
    depend on the mesh, since no kernel lets others choose its mask.
    """

    module_class = _RandomHeadsModule
