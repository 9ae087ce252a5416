"""Tokenizers and files for the data tests; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conf.schema import DataConfig, ModelConfig
from flower_app.data.examples import IGNORED, Encoded, Example
from flower_app.data.tokenizer import load_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(ModelConfig(tokenizer="bytes"))
    assert isinstance(tokenizer, ByT5Tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


def fast_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: one token per byte, with offsets, and no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


def files_config(path: Path, **values: Any) -> DataConfig:
    return DataConfig(source="files", path=str(path), **values)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def learned_text(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what is learned; each run of learned tokens ends in |."""
    runs = [""]
    for token, learned in zip(encoded.ids, encoded.learned, strict=True):
        if learned:
            runs[-1] += chr(token)
        elif runs[-1]:
            runs.append("")
    texts = [tokenizer.decode([ord(letter) for letter in run]) for run in runs if run]
    return "".join(text + "|" for text in texts)


def contents(examples: Iterable[Example]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(e.input_ids.tolist()), tuple(e.labels.tolist())) for e in examples]


def decoded(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(e.input_ids, skip_special_tokens=True) for e in examples]


def is_masked(labels: Iterable[int]) -> list[bool]:
    return [label == IGNORED for label in labels]
