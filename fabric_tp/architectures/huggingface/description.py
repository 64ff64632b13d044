from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import (
    Architecture,
    Attention,
    Block,
    Experts,
    FeedForward,
    Fused,
    Mixer,
    Stacked,
)
from fabric_tp.architectures.heads import HeadCounts


def _counts(attention: nn.Module) -> HeadCounts:
    module: Any = attention
    if hasattr(module, "kv_b_proj"):
        return HeadCounts(module.num_heads, module.num_heads, module.qk_head_dim)
    size: int = module.head_dim
    if hasattr(module, "qkv_proj"):
        return HeadCounts(module.config.num_attention_heads, module.config.num_key_value_heads, size)
    if hasattr(module, "query_key_value"):
        heads = module.query_key_value.out_features // (3 * size)
        return HeadCounts(heads, heads, size)
    keys = module.k_proj.out_features // size
    groups = getattr(module, "num_key_value_groups", None)  # Qwen3-Next's q_proj makes a gate for each query too
    return HeadCounts(keys * groups if groups else module.q_proj.out_features // size, keys, size)


def _qkv(attention: nn.Module) -> Mapping[str, int]:
    return _counts(attention).qkv


def _gate_and_up(feed_forward: nn.Module) -> Mapping[str, int]:
    module: Any = feed_forward
    return dict.fromkeys(("gate", "up"), module.gate_up_proj.out_features // 2)


def _stacked(experts: nn.Module) -> Mapping[str, Stacked]:
    """Parameters of the shapes (experts, outputs, inputs), or the other way round."""
    module: Any = experts
    transposed = getattr(module, "is_transposed", False)
    if hasattr(module, "gate_up_proj"):
        transposed = module.gate_up_proj.shape[2] == 2 * module.down_proj.shape[1]
    outputs, inputs = (2, 1) if transposed else (1, 2)
    apply_gate = getattr(module, "_apply_gate", None)
    consecutive = apply_gate is None or apply_gate.__name__ == "_default_apply_gate"
    known = {
        "fc1.weight": Stacked(2, ("projection", "gate")),  # Aria
        "fc2.weight": Stacked(1),
        "gate_up_proj": Stacked(outputs, ("gate", "up") if consecutive else ()),  # GPT-OSS: each gate beside its up
        "gate_up_proj_bias": Stacked(1, ("gate", "up") if consecutive else ()),
        "up_proj": Stacked(outputs),
        "up_proj_bias": Stacked(1),
        "down_proj": Stacked(inputs),
        "down_proj_bias": Stacked(None),
    }
    return {name: known[name] for name, _ in experts.named_parameters() if name in known}


EXPERTS = Experts(
    name="mlp",
    router="gate",
    experts="experts",
    stacked=_stacked,
    shared=("shared_expert", "shared_experts", "shared_mlp"),
    whole=("router", "shared_expert_gate"),
    own=("expert_bias",),  # AFMoE
    sampling=("router.router_jitter_noise",),  # Phi-3.5-MoE
)

BLOCK = Block(
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "pre_mlp_layernorm",  # AFMoE
        "post_self_attn_layernorm",  # GLM-4
        "post_mlp_layernorm",
        "attention_layernorm",  # Apertus
        "feedforward_layernorm",
    ),
    attention=Attention(
        name="self_attn",
        counts=_counts,
        queries=("q_proj", "q_b_proj", "gate_proj"),
        keys_values=("k_proj", "v_proj", "kv_b_proj"),
        whole=("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm", "indexer"),
        fused={
            "qkv_proj": Fused(_qkv, "consecutive"),
            "query_key_value": Fused(_qkv, "by_group"),
        },  # the latter Persimmon
        outputs=("o_proj", "out_proj", "dense"),
        query_norms=("q_norm", "q_layernorm", "query_layernorm"),
        key_norms=("k_norm", "k_layernorm", "key_layernorm"),
        output_norms=("attn_sub_norm",),  # BitNet
        query_counts=("num_heads", "config.num_attention_heads"),
        key_value_counts=("num_key_value_heads", "config.num_key_value_heads"),
        group_sizes=("num_key_value_groups",),
        head_features=("hidden_size", "embed_dim"),
        per_query_head=("sinks",),
        dropout_rates=("attention_dropout", "dropout"),
    ),
    feed_forward=FeedForward(
        name="mlp",
        inputs=("gate_proj", "up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h"),
        fused={"gate_up_proj": Fused(_gate_and_up, "consecutive")},
        outputs=("down_proj", "fc2", "c_proj", "fc_out", "dense_4h_to_h"),
        norms=("ffn_sub_norm",),
        whole=("act_fn",),
    ),
    experts=EXPERTS,
    mixers=(
        Mixer("linear_attn"),  # Qwen3-Next, OLMo hybrid
        Mixer("self_attn", ("qkv_proj", "output_gate")),  # MiniMax
        Mixer("mamba", ("in_proj", "out_proj")),
        Mixer("conv", ("in_proj", "out_proj")),  # LFM2
    ),
    dropout_rates=("mlp.jitter_noise", "mlp.input_jitter_noise"),
)

HUGGINGFACE = Architecture(
    name="huggingface",
    description="a Transformers causal LM with Llama-like names (Llama, Mistral, Qwen 2 and 3, Phi-3, Gemma 2, OLMo 2)",
    embedding="model.embed_tokens",
    whole=("model.embed_tokens_extend",),  # Phi-4-multimodal
    blocks="model.layers",
    block=BLOCK,
    norm="model.norm",
    head="lm_head",
    measures_embedding=True,
    balances_experts=("output_router_logits",),
    splits_sequence=("logits_to_keep",),
    tested=tuple(
        f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}ForCausalLM"
        for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma2", "Gemma3", "Olmo2")
    ),
)
