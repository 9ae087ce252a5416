"""Models that plans are held against: small, but real, of families that are built differently."""

from __future__ import annotations

import json
from typing import Any

from conf.load import load_config
from conf.schema import Config

VOCABULARY = 1024

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _HEADS,
    "gpt2": {"n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
    "qwen3": {**_HEADS, "head_dim": 64},
    "gemma2": {**_HEADS, "head_dim": 64},
    "mistral": {**_HEADS, "sliding_window": 64},
    "phi": {"num_attention_heads": 4},
    "opt": {"num_attention_heads": 4},
    "mixtral": {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""What each needs besides its sizes."""

_WITHOUT_SDPA = ("gemma2",)


def family_config(family: str, width: int, blocks: int, overrides: list[str]) -> Config:
    """The demo with a model of a family, of a width and a number of blocks.

    Parameters
    ----------
    family : str
        A key of `FAMILIES`.
    width, blocks : int
    overrides : list of str
        ``key=value``, over the demo.
    """
    scratch = {"model_type": family, "vocab_size": VOCABULARY, **FAMILIES[family]}
    if family == "gpt2":
        scratch |= {"n_embd": width, "n_layer": blocks}
    else:
        scratch |= {"hidden_size": width, "num_hidden_layers": blocks}
    if family == "opt":
        scratch |= {"ffn_dim": 4 * width, "word_embed_proj_dim": width}
    elif family == "mixtral":
        scratch |= {"intermediate_size": width}
    elif family != "gpt2":
        scratch |= {"intermediate_size": 3 * width}
    eager = ["model.attention=eager"] if family in _WITHOUT_SDPA else []
    own = [f"model.scratch={json.dumps(scratch)}", *eager, "train.local_steps=1000"]
    return load_config("demo", [*own, *overrides])
