"""The tokenizer of a model: its own, another, or bytes."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from conf.schema import ModelConfig
from models.source import tokenizer_of


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    `bytes` is ByT5's: <pad>, </s>, <unk>, then one token for each UTF-8 byte (byte + 3): 259.
    A tokenizer without a padding token pads with its end-of-text token: padding is masked by
    length, so the vocabulary and the results do not change.

    Raises
    ------
    ValueError
        If none is found, or it has neither a padding nor an end-of-text token.
    """
    if model.tokenizer == "bytes":
        # Text that spells </s> or <pad> stays text.
        return ByT5Tokenizer(extra_ids=0, split_special_tokens=True)
    name = model.tokenizer or tokenizer_of(model.path, model.base)
    if not name or name.startswith("last:"):
        raise ValueError(
            f"no tokenizer: model.tokenizer={model.tokenizer!r} and model.path={model.path!r}; "
            "set model.tokenizer to a folder, a hub id or bytes"
        )
    path = Path(name).expanduser()
    if name.startswith(("/", "~", ".")) and not path.exists():
        kind = "file" if path.suffix == ".gguf" else "folder"
        raise ValueError(
            f"no tokenizer: no {kind} {path.absolute()}; set model.tokenizer to a folder or hub id "
            "that has one, or to bytes"
        )
    try:
        if path.suffix == ".gguf":
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path if path.exists() else name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no tokenizer could be loaded from {name!r} ({reason}); set model.tokenizer to a "
            "folder or hub id that has one, or to bytes"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {name!r} has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
