"""Tiny random models of any family, for tests, parity checks and the self-check of `split`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

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
    "dropout": 0.0,
}


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """Return a config of `model_type` with sizes cut down; `changes` override them."""
    default = AutoConfig.for_model(model_type)
    kwargs: dict[str, Any] = {k: v for k, v in SIZES.items() if hasattr(default, k)}
    for key in ("bos_token_id", "eos_token_id"):
        if hasattr(default, key):
            kwargs[key] = 1
    if getattr(default, "pad_token_id", None) is not None:
        kwargs["pad_token_id"] = 0
    kwargs.update(changes)
    return AutoConfig.for_model(model_type, **kwargs)
