"""From texts to token ids and labels: plain text, prompt and completion, chat messages.

Labels stand at the position of their own token (the loss shifts them); -100 does not count.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from conf.schema import DataConfig, ModelConfig
from flower_app.data.tables import DataError

IGNORED = -100
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence of T tokens, with T >= 2 and at least one label that counts after the shift."""

    input_ids: torch.Tensor
    """(T,) int64."""
    labels: torch.Tensor
    """(T,) int64: the token's own id, or -100 where it is not learned. Not shifted."""


@dataclass(frozen=True)
class Encoded:
    """The token ids of one document and which of them are learned."""

    ids: list[int]
    learned: list[bool]
    whole: bool
    """A prompt or a chat is one example; only plain text may be cut into several."""


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
    name = model.tokenizer or model.path
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


def encode(
    row: Mapping[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Encoded | None:
    """Encode one row of the data; None if it holds no text.

    Raises
    ------
    DataError
        If a column holds something else than text, or messages cannot be rendered.
    """
    if config.messages_column:
        messages = row[config.messages_column]
        return encode_chat(messages, tokenizer) if messages else None
    if config.prompt_column:
        prompt = _text(row, config.prompt_column)
        completion = _text(row, config.completion_column)
        return encode_prompt(prompt, completion, tokenizer) if completion.strip() else None
    text = _text(row, config.text_column)
    if not text.strip():
        return None
    ids = _with_end(_ids(text, tokenizer), tokenizer)
    return Encoded(ids, [True] * len(ids), whole=False)


def encode_prompt(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode prompt and completion apart, as generation meets them; only the completion is learned.

    They are joined as they are: a separator belongs into the data.
    """
    before = _ids(prompt, tokenizer) if prompt else _start(tokenizer)
    after = _with_end(tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer)
    return Encoded(before + after, [False] * len(before) + [True] * len(after), whole=True)


def encode_chat(messages: Any, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Render chat messages with the tokenizer's template; only assistant turns are learned.

    A template with `{% generation %}` marks them itself. With any other, a turn is what rendering
    one message more appends to the conversation so far with its generation prompt; the markers
    that end the turn are learned too.

    Parameters
    ----------
    messages : list of dict
        Each with `role` and `content`.

    Raises
    ------
    DataError
        If there is no template, the messages do not suit it, or it rewrites earlier turns.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "data.messages_column needs a tokenizer with a chat template, and this one has none: "
            "take an instruct model's tokenizer, or data.prompt_column and data.completion_column"
        )
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(
            f"chat messages must be a list of {{role, content}}, got {type(messages).__name__}"
        )
    for number, turn in enumerate(messages, start=1):
        if not isinstance(turn, Mapping) or "role" not in turn:
            what = "no role" if isinstance(turn, Mapping) else f"a {type(turn).__name__}"
            raise DataError(
                "chat messages must be a list of {role, content}, got one with "
                f"{what} (message {number} of {len(messages)})"
            )
    # Arrow gives every message the union of all keys, absent ones as None.
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    template = tokenizer.get_chat_template()
    if "generation %}" in template and tokenizer.is_fast:
        rendered = _render(turns, tokenizer, tokenize=True, return_assistant_tokens_mask=True)
        return Encoded(
            list(rendered["input_ids"]), [bool(m) for m in rendered["assistant_masks"]], whole=True
        )
    text, spans = _assistant_spans(turns, tokenizer)
    return _encode_spans(text, spans, tokenizer)


def cut(encoded: Encoded, config: DataConfig, where: str) -> list[Example]:
    """Return the examples of at most `config.context` tokens of one document.

    Windows follow one another without overlap. Those in which nothing is learned (one token, or
    only prompt tokens) are left out, so the list may be empty.

    Raises
    ------
    DataError
        If the document is longer than the context and `config.overlong` is `refuse`.
    """
    size = config.context
    if len(encoded.ids) > size and config.overlong == "refuse":
        raise DataError(
            f"{where} has {len(encoded.ids)} tokens, more than data.context={size}, and "
            "data.overlong=refuse: raise the context, or let texts be cut with "
            "data.overlong=chunk or truncate"
        )
    one = encoded.whole or config.overlong == "truncate"
    starts = [0] if one else range(0, len(encoded.ids), size)
    windows = [
        (encoded.ids[start : start + size], encoded.learned[start : start + size])
        for start in starts
    ]
    return [_example(ids, learned) for ids, learned in windows if any(learned[1:])]


def _example(ids: list[int], learned: list[bool]) -> Example:
    input_ids = torch.tensor(ids, dtype=torch.int64)
    labels = input_ids.masked_fill(~torch.tensor(learned), IGNORED)
    return Example(input_ids, labels)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise DataError(f"column {column!r} must hold text, got {type(value).__name__}")


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text's beginning: with the tokenizer's start token, without its end."""
    ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return _ids("", tokenizer)


def _with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _render(turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(turns, **options)
    except Exception as error:  # noqa: BLE001 - its text may quote data
        roles = [turn["role"] if turn.get("role") in _ROLES else "(other)" for turn in turns]
        raise DataError(
            f"the chat template refuses a conversation with the roles {roles}: "
            f"{_template_reason(error, tokenizer)}"
        ) from None


def _template_reason(error: Exception, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the error's words if they stand in the template, where no message gets into them."""
    words = str(error)
    literal = rf"raise_exception\(\s*(['\"]){re.escape(words)}\1\s*\)"
    found = re.search(literal, tokenizer.get_chat_template())
    return words if words and found else type(error).__name__


def _assistant_spans(
    turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendered conversation and the character ranges of its assistant turns."""
    text: str = _render(turns, tokenizer, tokenize=False)
    spans = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = ""
        if index:
            before = _render(turns[:index], tokenizer, tokenize=False, add_generation_prompt=True)
        upto = _render(turns[: index + 1], tokenizer, tokenize=False)
        if not (text.startswith(upto) and upto.startswith(before)):
            raise DataError(
                "the chat template rewrites earlier turns, so that what the assistant said cannot "
                f"be told from the rest (turn {index + 1} of {len(turns)}): give the tokenizer a "
                "template with {% generation %} marks, or end each conversation at its first answer"
            )
        spans.append((len(before), len(upto)))
    return text, spans


def _encode_spans(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """Encode a rendered conversation; tokens that begin inside a span are learned."""
    if tokenizer.is_fast:
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = [
            any(start <= first < end for start, end in spans)
            for first, _ in coded["offset_mapping"]
        ]
        return Encoded(list(coded["input_ids"]), learned, whole=True)
    # A slow tokenizer gives no offsets: what lies between two borders is encoded on its own.
    borders = sorted({0, len(text), *(border for span in spans for border in span)})
    ids: list[int] = []
    learned = []
    for start, end in itertools.pairwise(borders):
        piece = tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
        ids += piece
        learned += [any(first <= start < last for first, last in spans)] * len(piece)
    return Encoded(ids, learned, whole=True)
