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

ALSO: tuple[str, ...] = ()
"""Checked by the slow test, which fails if one of them is not exact."""


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
