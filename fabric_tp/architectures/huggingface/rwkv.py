from dataclasses import replace

from fabric_tp.architectures.architecture import FeedForward, Mixer
from fabric_tp.architectures.huggingface.description import BLOCK, HUGGINGFACE

RWKV = replace(
    HUGGINGFACE,
    name="rwkv",
    description="a Transformers RWKV",
    embedding="rwkv.embeddings",
    blocks="rwkv.blocks",
    norm="rwkv.ln_out",
    head="head",
    block=replace(
        BLOCK,
        norms=("pre_ln", "ln1", "ln2"),
        mixers=(Mixer("attention", ("receptance",)),),
        feed_forward=FeedForward(name="feed_forward", inputs=("key",), outputs=("value",), gates=("receptance",)),
        experts=None,
    ),
    tested=(),
)
