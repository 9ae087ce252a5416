"""From rows to token ids: plain text, prompt and completion; conversations are `chat`'s.

A document begins as the tokenizer begins a text, and ends with one end token, learned once:

    plain text              [start] text [end]
    prompt and completion   [start] prompt | completion [end]      learned after |

The start is what the tokenizer puts there by itself (a BOS, a [CLS], nothing), unless the text
spells it already; the end is its end-of-text token, or what it ends a text with if it has none,
unless the text ends with it already.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from conf.schema import DataConfig
from flower_app.data.chat import encode_chat
from flower_app.data.examples import IGNORED, Encoded, Example, cut
from flower_app.data.formats import BESIDE, alpaca_prompt, layout_of
from flower_app.data.refusals import DataError
from flower_app.data.tokenizer import load_tokenizer

__all__ = [
    "IGNORED", "Encoded", "Example", "cut", "encode", "encode_chat", "encode_prompt",
    "encode_text", "load_tokenizer",
]  # fmt: skip

_LEADS = (".", "\n", ")", "a", "0", "。", ":")
"""What a completion is tokenized behind, where a tokenizer treats the beginning of a text apart."""


def encode(
    row: Mapping[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Encoded | None:
    """Encode one row of the data; None if it holds no text.

    Raises
    ------
    DataError
        If a column holds something else than text, or messages cannot be rendered.
    """
    layout = layout_of(config, tuple(row))
    columns = list(layout.columns.values())
    if layout.kind == "messages":
        messages = row[columns[0]]
        beside = {name: _listed(row.get(name), name) for name in BESIDE}
        return encode_chat(messages, tokenizer, **beside) if messages else None
    texts = [_text(row, column) for column in columns]
    if not texts[-1].strip():
        return None
    if layout.kind == "text":
        return encode_text(texts[0], tokenizer)
    if layout.kind == "alpaca":
        texts[0] = alpaca_prompt(texts[0], _text(row, "input"))
    return encode_prompt(texts[0], texts[1], tokenizer)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode plain text; every token is learned."""
    start, end = _ends(tokenizer, tokenizer.eos_token_id)
    ids = _ended(_started(_bare(text, tokenizer), start), end)
    return Encoded(ids, [True] * len(ids), whole=False)


def encode_prompt(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode prompt and completion, joined as they are; only the completion is learned.

    The ids begin with those of the prompt alone, as generation meets it, and decode to the joined
    text. Should no tokens of the completion do both (a tokenizer that joins words over the border
    and cannot be told not to), the joined text counts, and tokens that reach into the completion
    are learned.
    """
    start, end = _ends(tokenizer, tokenizer.eos_token_id)
    before = _bare(prompt, tokenizer) if prompt else []
    joined = _bare(prompt + completion, tokenizer)
    after = next(_continuations(before, joined, completion, tokenizer), None)
    if after is None:
        border = _border(before, joined, prompt, completion, tokenizer)
        before, after = joined[:border], joined[border:]
    if start and (before or joined)[:1] != start[:1]:
        before = [*start, *before]
    after = _ended(after, end)
    return Encoded(before + after, [False] * len(before) + [True] * len(after), whole=True)


def _continuations(
    before: list[int], joined: list[int], completion: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    """Yield tokens of the completion that follow those of the prompt and spell the joined text."""
    if joined[: len(before)] == before:
        yield joined[len(before) :]
    text = _decoded(joined, tokenizer)
    for lead in ("", *_LEADS):
        ahead = _bare(lead, tokenizer) if lead else []
        ids = _bare(lead + completion, tokenizer)
        after = ids[len(ahead) :]
        if ids[: len(ahead)] == ahead and _decoded(before + after, tokenizer) == text:
            yield after


def _border(
    before: list[int],
    joined: list[int],
    prompt: str,
    completion: str,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Return how many tokens of the joined text do not reach into the completion."""
    if not tokenizer.is_fast:
        return next((i for i, (a, b) in enumerate(zip(before, joined)) if a != b), 0)  # noqa: B905
    coded = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
    return sum(last <= len(prompt) for _, last in coded["offset_mapping"])


@lru_cache(maxsize=8)
def _ends(tokenizer: PreTrainedTokenizerBase, eos: int | None) -> tuple[list[int], list[int]]:
    """Return the tokens before and after a text."""
    full, bare = list(tokenizer("a")["input_ids"]), _bare("a", tokenizer)
    own = [] if eos is None else [eos]
    at = (
        next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        if bare
        else (len(full) - (full[-1:] == own))
    )
    return full[:at], own or full[at + len(bare) :]


def _started(ids: list[int], start: list[int]) -> list[int]:
    return [*start, *ids] if start and ids[:1] != start[:1] else ids


def _ended(ids: list[int], end: list[int]) -> list[int]:
    return [*ids, *end] if end and ids[-1:] != end[-1:] else ids


def _bare(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    hint = "; for conversations, set data.format=messages" if isinstance(value, list) else ""
    raise DataError(f"column {column!r} must hold text, got {type(value).__name__}{hint}")


def _listed(value: Any, column: str) -> list[dict[str, Any]] | None:
    """Return the objects of a column beside the messages: a list, or a list as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"column {column!r} is neither a list nor JSON text") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise DataError(f"column {column!r} must be a list of objects, got {type(value).__name__}")
    return value
