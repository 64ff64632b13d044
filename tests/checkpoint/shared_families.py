"""Small models of every family that litgpt and Transformers share, as both call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from litgpt import Config
from torch import nn

from fabric_tp.testing.small import randomize, small_config


def _gpt_neox(c: Config) -> dict[str, Any]:
    return {"rotary_pct": c.rotary_percentage, "use_parallel_residual": c.parallel_residual}


def _falcon(c: Config) -> dict[str, Any]:
    new = c.n_query_groups != 1
    kind = {"new_decoder_architecture": new, "multi_query": not new, "num_kv_heads": c.n_query_groups}
    return {**kind, "parallel_attn": True, "bias": False, "alibi": False, "ffn_hidden_size": c.intermediate_size}


def _phi(c: Config) -> dict[str, Any]:
    return {"partial_rotary_factor": c.rotary_percentage, "hidden_act": "gelu_new"}


def _gemma(c: Config) -> dict[str, Any]:
    return {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}


def _gemma_2(c: Config) -> dict[str, Any]:
    return {
        **_gemma(c),
        "query_pre_attn_scalar": c.attention_scores_scalar,
        "layer_types": [
            ("full_attention", "sliding_attention")[windowed] for windowed in c.sliding_window_indices or ()
        ],
        "sliding_window": c.sliding_window_size,
        "attn_logit_softcapping": c.attention_logit_softcapping,
        "final_logit_softcapping": c.final_logit_softcapping,
    }


def _experts(c: Config) -> dict[str, Any]:
    return {
        "num_experts": c.n_expert,
        "num_local_experts": c.n_expert,
        "num_experts_per_tok": c.n_expert_per_token,
        "moe_intermediate_size": c.moe_intermediate_size or c.intermediate_size,
        "norm_topk_prob": True,
        "sliding_window": None,
    }


def _plain(c: Config) -> dict[str, Any]:
    return {"sliding_window": c.sliding_window_size}


FAMILIES: dict[str, tuple[str, Any]] = {
    "pythia-14m": ("GPTNeoX", _gpt_neox),
    "falcon-7b": ("Falcon", _falcon),
    "falcon-40b": ("Falcon", _falcon),
    "Llama-2-7b-hf": ("Llama", _plain),
    "Llama-3-8B": ("Llama", _plain),
    "Mistral-7B-v0.1": ("Mistral", _plain),
    "Mixtral-8x7B-v0.1": ("Mixtral", _experts),
    "Gemma-2b": ("Gemma", _gemma),
    "Gemma-2-2b": ("Gemma2", _gemma_2),
    "Gemma-3-1b-it": ("Gemma3Text", _gemma_2),
    "phi-2": ("Phi", _phi),
    "Phi-3-mini-4k-instruct": ("Phi3", _plain),
    "Qwen2.5-0.5B": ("Qwen2", _plain),
    "Qwen3-0.6B": ("Qwen3", _plain),
    "Qwen3-30B-A3B": ("Qwen3Moe", _experts),
    "OLMo-1B-hf": ("Olmo", _plain),
    "OLMo-2-1124-7B": ("Olmo2", _plain),
    "stablelm-3b-4e1t": ("StableLm", lambda c: {"partial_rotary_factor": c.rotary_percentage, "use_qkv_bias": False}),
}


def config_of(name: str) -> Config:
    return small_config(name, **({"final_logit_softcapping": 1000.0} if "Gemma-2-" in name else {}))  # never near it


def transformers_model(name: str) -> nn.Module:
    """Transformers' model of the family, with random values."""
    import transformers

    c = config_of(name)
    kind, more = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=c.padded_vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_query_groups,
        max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps,
        layer_norm_eps=c.norm_eps,
        layer_norm_epsilon=c.norm_eps,
        rope_theta=c.rope_base,
        attention_bias=c.attn_bias or c.bias,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **({} if kind == "Falcon" else {"head_dim": c.head_size}),
        **more(c),
    )
    name = {"Gemma3Text": "Gemma3"}.get(kind, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()


def download(name: str, directory: Path, **options: Any) -> nn.Module:
    """A directory as the hub has it, and the model."""
    model = transformers_model(name)
    model.save_pretrained(directory, **options)
    return model
