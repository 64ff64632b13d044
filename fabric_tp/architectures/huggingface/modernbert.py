from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import FeedForward, Fused
from fabric_tp.architectures.huggingface.description import BLOCK, HUGGINGFACE


def _act_and_gate(feed_forward: nn.Module) -> Mapping[str, int]:
    module: Any = feed_forward
    return dict.fromkeys(("act", "gate"), module.Wi.out_features // 2)


MODERNBERT = replace(
    HUGGINGFACE,
    name="modernbert",
    description="a Transformers ModernBERT decoder",
    embedding="model.embeddings.tok_embeddings",
    before_blocks=("model.embeddings",),
    block=replace(
        BLOCK,
        norms=("attn_norm", "mlp_norm"),
        attention=replace(BLOCK.attention, name="attn", outputs=("Wo",), head_features=("all_head_size",)),
        feed_forward=FeedForward(
            name="mlp", inputs=(), outputs=("Wo",), fused={"Wi": Fused(_act_and_gate, "consecutive")}
        ),
        experts=None,
        dropout_rates=(),
    ),
    norm="model.final_norm",
    after_blocks=("lm_head",),
    head="decoder",
    tested=(),
)
