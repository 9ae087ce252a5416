"""Which model families are tested to split exactly, and what a config may not ask for.

A family is in the table because `tests/models/test_every_family.py` found bottom + trunk + top
equal to the unsplit model at every cut, padded and not. No family needs code of its own.
"""

from __future__ import annotations

import difflib

from transformers import PretrainedConfig

NAMED = (
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "opt",
    "gpt_neox",
    "olmo2",
)
"""Checked in full by the default test suite and by `graft parity --families`."""

ALSO = (
    "afmoe",
    "apertus",
    "apertus1p5_text",
    "arcee",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "bamba",
    "beam",
    "bert",
    "bert-generation",
    "biogpt",
    "bitnet",
    "bloom",
    "camembert",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "ctrl",
    "cwm",
    "data2vec-text",
    "deepseek_v2",
    "deepseek_v3",
    "diffllama",
    "doge",
    "dots1",
    "electra",
    "ernie",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone",
    "exaone4",
    "exaone_moe",
    "falcon",
    "falcon_mamba",
    "flex_olmo",
    "flint",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt-sw3",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox_japanese",
    "gpt_oss",
    "gptj",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hyperclovax",
    "inkling_text",
    "internlm3",
    "iquestcoder",
    "jais2",
    "jamba",
    "jetmoe",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lara_mini",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "llama4_text",
    "mamba",
    "mamba2",
    "megatron-bert",
    "mellum",
    "mimo_v2_flash",
    "minicpm3",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral",
    "ministral3",
    "mixtral",
    "modernbert-decoder",
    "moshi",
    "mpt",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "persimmon",
    "phi",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "sarvam_mla",
    "sarvam_moe",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "trocr",
    "vaultgemma",
    "whisper",
    "xglm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlstm",
    "youtu",
)
"""Checked by the slow test, which fails if one of them is not exact.

Left out though exact there: families with a config flag that lets a block reuse what another has
computed (deepseek_v32, glm_moe_dsa), and those whose parts `load_part` cannot load by itself.
"""


_PAST_IT = "its weight is read past the layer, so that no gradient reaches an adapter"
_PEFT = "PEFT refuses it: fused kernels read its weight past the layer"
_NO_ENCODER = "it attends to an encoder, and there is none"
_NO_GRADIENT = "it only selects tokens, without a gradient"

# Linear layers that take no adapter: by family, the (last) names of a path, and why.
NO_ADAPTER: dict[str, dict[str, str]] = {
    "axk2": {"indexer": _NO_GRADIENT},
    "falcon_h1": {"out_proj": _PEFT},
    "falcon_mamba": {"out_proj": _PEFT, "dt_proj": _PAST_IT},
    "jamba": {"dt_proj": _PAST_IT},
    "mamba": {"out_proj": _PEFT, "dt_proj": _PAST_IT},
    "mamba2": {"out_proj": _PEFT},
    "nemotron_h": {"out_proj": _PEFT},
    "phimoe": {"router": "it gets a gradient only where two experts are close"},
    "trocr": {"encoder_attn": _NO_ENCODER},
    "whisper": {"encoder_attn": _NO_ENCODER},
}
"""The slow test fails if an adapter of a tested family gets no gradient."""


def tested_families() -> tuple[str, ...]:
    """Return the model types of the tested table, sorted."""
    return tuple(sorted({*NAMED, *ALSO}))


def require_tested(config: PretrainedConfig, allow_untested: bool) -> bool:
    """Return whether the family is tested; refuse one that is not, unless it is allowed.

    Raises
    ------
    ValueError
        If the family is outside the tested table and `allow_untested` is false.
    """
    kind = config.model_type
    if kind in tested_families():
        return True
    if allow_untested:
        return False
    close = difflib.get_close_matches(kind, tested_families(), n=1)
    hint = f" (nearest tested: {close[0]})" if close else ""
    raise ValueError(
        f"model family {kind!r} is not tested to split exactly{hint}; to try it all the same, with "
        "a check against the unsplit model, set allow-untested (allow_untested=True)"
    )


# What is refused in any family: blocks that are left out at random, or that read other blocks.
REFUSED_FLAGS = {
    "layerdrop": "blocks are dropped at random while training; set layerdrop to 0",
    "num_kv_shared_layers": "blocks reuse the keys and values of other blocks",
    "hidden_size_per_layer_input": "each block reads an embedding of the token ids",
    "add_cross_attention": "blocks attend to an encoder",
}


def refuse_flags(config: PretrainedConfig) -> None:
    """Refuse a config that makes blocks depend on more than the hidden states below them."""
    text = config.get_text_config(decoder=True)
    for flag, why in REFUSED_FLAGS.items():
        value = getattr(text, flag, None)
        if value:
            raise ValueError(f"{config.model_type} with {flag}={value} cannot be split: {why}")
