from __future__ import annotations

from fabric_tp.styles.attention_heads import HeadsModule, ShardHeads
from fabric_tp.styles.random_module import RandomModule


class _RandomHeadsModule(HeadsModule, RandomModule):
    by_rank = True


class RandomHeads(ShardHeads):
    """An attention module with dropout inside its kernel, which draws from torch's generator.

    It draws from a state of its own, made of the seed, the call and the rank: other masks on other ranks, other
    samples and in other calls, and the same when activations are computed again. Unlike :class:`Dropout`'s they do
    depend on the mesh, since no kernel lets others choose its mask.

    Args:
        heads: As all others in :class:`ShardHeads`.

    ===============  ===========  =========  ==========  ==========================  ==========
    input_layout     x            inside     forward     backward                    gradient
    ===============  ===========  =========  ==========  ==========================  ==========
    ``"replicate"``  (b, s, h)    (b, s, h)              all-reduce
    ``"sequence"``   (b, s/t, h)  (b, s, h)  all-gather  all-gather, reduce-scatter
    ``None``         (b, s, h)    (b, s, h)                                          partial: x
    ===============  ===========  =========  ==========  ==========================  ==========

    Raises:
        ValueError: When it is called in training: nobody told it the seed.

    Example::

        plan = {"attention": RandomHeads(Heads(8, 8), query_counts=["n_heads"]), "attention.out": Rowwise()}
    """

    module_class = _RandomHeadsModule
