from collections.abc import Mapping
from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import Architecture, Attention, Block, Experts, FeedForward, Fused, Stacked
from fabric_tp.architectures.heads import HeadCounts


def _counts(attention: nn.Module) -> HeadCounts:
    module: Any = attention
    return HeadCounts(module.num_heads, module.num_key_value_heads, module.head_dim)


def _qkv(attention: nn.Module) -> Mapping[str, int]:
    return _counts(attention).qkv


def _stacked(experts: nn.Module) -> Mapping[str, Stacked]:
    """Parameters of the shape (experts * width, hidden features), which Transformers calls the other way round."""
    return dict.fromkeys(("mlp.w1", "mlp.v1", "mlp.w2"), Stacked(1))


DBRX = Architecture(
    name="dbrx",
    description="a Transformers DBRX",
    embedding="transformer.wte",
    blocks="transformer.blocks",
    block=Block(
        norms=("norm_attn_norm.norm_1", "norm_attn_norm.norm_2"),
        attention=Attention(
            name="norm_attn_norm.attn",
            counts=_counts,
            fused={"Wqkv": Fused(_qkv, "consecutive")},
            outputs=("out_proj",),
            query_counts=("num_heads",),
            key_value_counts=("num_key_value_heads",),
            group_sizes=("num_key_value_groups",),
            head_features=("hidden_size",),
            dropout_rates=("attention_dropout",),
        ),
        feed_forward=FeedForward(name="ffn", inputs=(), outputs=()),
        experts=Experts(
            name="ffn", router="router", experts="experts", stacked=_stacked, hidden_sizes=("experts.hidden_size",)
        ),
        dropout_rates=("resid_pdrop", "norm_attn_norm.resid_pdrop", "ffn.router.moe_jitter_eps"),
    ),
    norm="transformer.norm_f",
    head="lm_head",
    splits_sequence=("logits_to_keep",),
    measures_embedding=True,
    balances_experts=("output_router_logits",),
)
