"""Transformers' causal language models made small, their structure kept."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fabric_tp.architectures.huggingface.cache import can_cache
from fabric_tp.architectures.small import HIDDEN, LENGTH, VOCABULARY, WINDOW

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "Mistral": ("mistral", {"head_dim": 8}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "Phi3": ("phi3", {}),
    "Gemma2": ("gemma2", {"head_dim": 16}),
    "Gemma3": ("gemma3_text", {"head_dim": 16}),
    "Gemma3, six layers": ("gemma3_text", {"head_dim": 16, "num_hidden_layers": 6}),
    "Olmo2": ("olmo2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-NeoX, one residual after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "Mixtral": ("mixtral", {}),
}
"""Families of Transformers' causal language models: the type, and what its config needs besides small sizes."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_words", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("hidden_size_global",), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 8),
    **dict.fromkeys(("encoder_attention_heads",), 8),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), HIDDEN),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 4 * LENGTH),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_routed_experts", "moe_k", "num_selected_experts", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop"), 0.0),
    **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop", "embed_dropout", "resid_dropout"), 0.0),
    **dict.fromkeys(("residual_dropout", "ffn_dropout"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "hidden_dropout_prob"), 0.0),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "ssm_state_size"), 16),
    "mamba_d_ssm": 128,
    "mamba_chunk_size": 8,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "use_cache": False,
}
"""Small sizes by the names that configs of Transformers have for them."""

_ONE_OF_EACH = {"layer_types": ["linear_attention", "full_attention"]}
TYPES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "chunk_size": 8},
    "minimax": {"block_size": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention"], "n_routed_experts": 4},
    "qwen3_next": {**_ONE_OF_EACH, "mlp_only_layers": [0]},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), _ONE_OF_EACH),
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 0, "use_mamba_kernels": False},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "use_mem_rope": True},
    **{name: {"head_dim": 8} for name in ("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe")},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 0.5, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": HIDDEN, "moe_num_experts": 4, "moe_top_k": 2},
    },  # its ffn_hidden_size is the model's width
    "gemma3": {
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": 1,
            "num_attention_heads": 8,
            "image_size": 32,
            "patch_size": 8,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": VOCABULARY - 1,
    },
    "phimoe": {"router_jitter_noise": 0.0},  # the only way to have the same experts each time in training
    "afmoe": {"num_dense_layers": 1},
    "glm_moe_dsa": {"index_topk": 4},  # fewer than there are tokens
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "reformer": {"axial_pos_embds": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "ctrl": {"dff": HIDDEN},
    "cpmant": {"dim_head": 8, "dim_ff": HIDDEN, "init_std": 0.02},
    "big_bird": {"attention_type": "original_full"},
    "xmod": {"default_language": "en_XX"},
}
"""What the configs of some types need besides small sizes."""

INPUTS: dict[str, tuple[str, ...]] = {"gemma3": ("token_type_ids",)}
"""Arguments of the tokens' shape without which some types do not train; of 0 for text."""

UNSET = ("num_key_value_heads", "num_experts_per_tok", "pad_token_id", "sliding_window", "use_cache")
"""Those that are given even where a config has None; other sizes then follow from the rest."""


def causal_types() -> list[str]:
    """Every type of causal language model that the installed Transformers knows.

    Raises:
        ValueError: Transformers is not installed.
    """
    _transformers()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_transformers(name: str, **overrides: Any) -> nn.Module:
    """A causal language model of Transformers; ``name`` is a key of ``TRANSFORMERS``.

    Raises:
        ValueError: Transformers is not installed.
    """
    model_type, options = TRANSFORMERS[name]
    return small_causal(model_type, **{**options, **overrides})


def small_causal(model_type: str, **overrides: Any) -> nn.Module:
    """The causal language model of a type, with its config's sizes made small wherever they have a known name.

    Raises:
        ValueError: Transformers is not installed.
    """
    transformers = _transformers()
    config = _small_config(transformers.CONFIG_MAPPING[model_type], {**TYPES.get(model_type, {}), **overrides})
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    is_outer = not isinstance(config, model_class.config_class)
    if is_outer:  # of a model with eyes or ears, within which is that of its language model
        config = config.get_text_config()
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config) if is_outer else transformers.AutoModelForCausalLM.from_config(config)


def small_inputs(model: nn.Module, tokens: Tensor) -> Tensor | dict[str, Tensor]:
    """What a model takes to be trained on these tokens: nothing else, or arguments by their names."""
    others = INPUTS.get(getattr(model.config, "model_type", ""), ())
    return {"input_ids": tokens, **{name: torch.zeros_like(tokens) for name in others}} if others else tokens


def own_generate(model: nn.Module, prompts: list[Tensor], max_new_tokens: int) -> list[Tensor]:
    """A batch of prompts with the likeliest continuations, by Transformers' own method."""
    own: Any = model
    own.generation_config.update(eos_token_id=None, forced_eos_token_id=None, pad_token_id=0)
    tokens, mask = (
        nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        for rows in (prompts, [torch.ones_like(prompt) for prompt in prompts])
    )
    masked = {"attention_mask": mask} if "attention_mask" in inspect.signature(own.forward).parameters else {}
    caches = can_cache(model)
    continued = own.generate(tokens, **masked, max_new_tokens=max_new_tokens, do_sample=False, use_cache=caches)
    longest = tokens.shape[1]
    return [row[longest - len(prompt) :] for row, prompt in zip(continued, prompts, strict=True)]


def _small_config(config_class: type, overrides: dict[str, Any]) -> Any:
    default = config_class()
    computed = {name for name in SIZES if isinstance(getattr(config_class, name, None), property)}
    known = {name: value for name, value in SIZES.items() if hasattr(default, name) and name not in computed}
    sizes = {name: value for name, value in known.items() if getattr(default, name) is not None or name in UNSET}
    if "kv_lora_rank" in sizes:  # each query head has keys and values of its own
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    inner = {name: value for name, value in vars(default).items() if hasattr(value, "to_diff_dict")}
    sizes |= {
        name: _small_config(type(value), TYPES.get(value.model_type, {})).to_dict() for name, value in inner.items()
    }
    return config_class(**{**sizes, **overrides})


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError("Transformers is not installed: pip install fabric_tp[hf]") from None
    return transformers
