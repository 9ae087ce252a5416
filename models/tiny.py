"""Tiny random models of any family, for tests, parity checks and the self-check of `split`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

BLOCKS = 4
VOCAB = 96
WINDOW = 4
CONTEXT = 64

# Sizes by the names that configs give them. A name that a config does not have is left out.
SIZES: dict[str, Any] = {
    "num_hidden_layers": BLOCKS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "sliding_window": WINDOW,
    "attention_window": WINDOW,
    "window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "ffn_hidden_size": 64,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "word_embed_proj_dim": 16,
    "embedding_size": 32,
    "rotary_dim": 4,
    "index_topk": 4,
    "chunk_size": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_shared_expert_intermediate_size": 16,
    "dropout": 0.0,
}


# Where a family's sizes depend on each other in a way of its own.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "attn_layer_indices": [1],
    },
    "deepseek_v4": {"hc_mult": 2},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB,
        "head_dim": 8,
    },
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
}

# Sizes that a family computes itself or keeps per layer.
LEFT_OUT = {
    "falcon": ("head_dim",),
    "gemma4_text": ("head_dim", "num_key_value_heads"),
    "gemma4_unified_text": ("head_dim", "num_key_value_heads"),
    "gpt_neo": ("num_hidden_layers",),
    "mamba2": ("num_attention_heads",),
    "musicgen": ("dropout",),
    "musicgen_melody": ("dropout",),
    "prophetnet": ("num_hidden_layers",),
    "xlnet": ("max_position_embeddings",),
    "xlstm": ("head_dim", "v_head_dim"),
}


def roughen(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Add noise to every weight: fresh biases are 0 and norms 1, which would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """Return a config of `model_type` with sizes cut down; `changes` override them."""
    default = AutoConfig.for_model(model_type)
    left_out = set(LEFT_OUT.get(model_type, ()))
    if has_key(default, "qk_rope_head_dim"):
        left_out.add("head_dim")
    kwargs: dict[str, Any] = {
        k: v for k, v in SIZES.items() if k not in left_out and has_key(default, k)
    }
    for key in ("bos_token_id", "eos_token_id"):
        if has_key(default, key):
            kwargs[key] = 1
    if has_key(default, "kv_lora_rank"):
        kwargs["num_key_value_heads"] = SIZES["num_attention_heads"]
    if getattr(default, "pad_token_id", None) is not None:
        kwargs["pad_token_id"] = 0
    kwargs.update(CHANGES.get(model_type, {}))
    kwargs.update(changes)
    return AutoConfig.for_model(model_type, **kwargs)


def has_key(config: PretrainedConfig, key: str) -> bool:
    """Return whether a config has a key; some refuse to be asked for per-layer ones."""
    try:
        return hasattr(config, key)
    except ValueError:
        return True


def byte_llama(hidden: int, blocks: int, context: int) -> dict[str, Any]:
    """The config of a small byte-level Llama, as `model.scratch` takes it."""
    return {
        "model_type": "llama",
        "vocab_size": 259,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
