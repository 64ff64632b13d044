from dataclasses import replace

from fabric_tp.architectures.huggingface.description import BLOCK, EXPERTS, HUGGINGFACE

LLAMA4 = replace(
    HUGGINGFACE,
    name="llama4",
    description="a Transformers Llama 4 or another with layers.*.feed_forward",
    block=replace(
        BLOCK,
        feed_forward=replace(BLOCK.feed_forward, name="feed_forward"),
        experts=replace(EXPERTS, name="feed_forward"),
    ),
    tested=(),
)
