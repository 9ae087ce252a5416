"""Conversations: rendered by the tokenizer's chat template; what the assistant says is learned."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from flower_app.data.examples import Encoded
from flower_app.data.refusals import DataError
from flower_app.data.turns import Turns, part_text, read_turns

logger = logging.getLogger(__name__)

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_REASONING = ("reasoning_content", "reasoning", "thinking")
_PROBE = "Qx7GraftProbe7xQ"


def encode_chat(
    messages: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: list[dict[str, Any]] | None = None,
    documents: list[dict[str, Any]] | None = None,
) -> Encoded:
    """Render chat messages with the tokenizer's template; only assistant turns are learned.

    A template with `{% generation %}` marks them itself. With any other, a turn is what rendering
    one message more appends to the conversation so far with its generation prompt; where the
    template renders a turn otherwise once others follow, or where nothing precedes it, it begins
    with its content. The markers that end a turn are learned too.

    Parameters
    ----------
    messages : list of dict
        Each with `role` and `content`, or as ShareGPT with `from` and `value`.
    tools, documents : list of dict, optional
        For the template.

    Raises
    ------
    DataError
        If there is no template, the messages do not suit it, or their turns cannot be told apart.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "conversations need a tokenizer with a chat template, and this one has none: "
            "take an instruct model's tokenizer, or data.prompt_column and data.completion_column"
        )
    template = _Template(tokenizer, {"tools": tools, "documents": documents})
    turns = _settled(read_turns(messages), template)
    notes = _notes(turns, template)
    if _MARKS.search(_COMMENT.sub("", template.source)):
        ids, learned = template.marked(turns)
    else:
        ids, learned = _encode_spans(*_assistant_spans(turns, template), tokenizer)
    return Encoded(ids, learned, whole=True, notes=notes)


@dataclass(frozen=True)
class _Template:
    """A tokenizer's chat template, with what stands beside the messages."""

    tokenizer: PreTrainedTokenizerBase
    beside: dict[str, list[dict[str, Any]] | None]

    @property
    def source(self) -> str:
        return self.tokenizer.get_chat_template(tools=self.beside["tools"])

    def render(self, turns: Turns, *, prompt: bool = False) -> str:
        """Render a conversation, with the generation prompt or not; or raise DataError."""
        try:
            return self._apply(turns, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # noqa: BLE001 - its text may quote data
            raise self._refusal(turns, error) from None

    def attempt(self, turns: Turns, *, prompt: bool = False) -> str | None:
        """Render a conversation that the template may refuse; None if it does."""
        try:
            return self._apply(turns, tokenize=False, add_generation_prompt=prompt)
        except Exception:  # noqa: BLE001 - whatever a template raises
            return None

    def marked(self, turns: Turns) -> tuple[list[int], list[bool]]:
        """Return ids and what the template's own marks say is learned, as transformers does."""
        try:
            if self.tokenizer.is_fast:
                found = self._apply(turns, return_dict=True, return_assistant_tokens_mask=True)
                return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
            texts, spans = render_jinja_template(
                [turns],
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.beside},
            )
        except Exception as error:  # noqa: BLE001 - its text may quote data
            raise self._refusal(turns, error) from None
        return _encode_spans(texts[0], spans[0], self.tokenizer)

    def _apply(self, turns: Turns, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(turns, **self.beside, **options)

    def _refusal(self, turns: Turns, error: Exception) -> DataError:
        logger.warning("the chat template refuses a conversation", exc_info=error)
        roles = [turn["role"] if turn.get("role") in _ROLES else "(other)" for turn in turns]
        return DataError(
            f"the chat template refuses a conversation with the roles {roles} (change its turns, "
            f"or give the tokenizer a template that takes them): {self._reason(error)}"
        )

    def _reason(self, error: Exception) -> str:
        """Return the error's words if they stand in the template: no message gets into those."""
        words = str(error)
        literal = rf"raise_exception\(\s*(['\"]){re.escape(words)}\1\s*\)"
        return words if words and re.search(literal, self.source) else type(error).__name__


# ---- what a conversation is ----------------------------------------------------------------------


def _settled(turns: Turns, template: _Template) -> Turns:
    """Return the turns with their content as the template takes it.

    Parts stay as they are where the template knows them; where it would print them as Python does,
    or fail, they become their texts, joined as they are. A turn without content gets an empty one
    where the template needs it.
    """
    turns = _with_parts(turns, template)
    if all("content" in turn for turn in turns) or template.attempt(turns) is not None:
        return turns
    return [{"content": "", **turn} for turn in turns]


def _with_parts(turns: Turns, template: _Template) -> Turns:
    parts = [part for turn in turns if isinstance(turn.get("content"), list)
             for part in turn["content"]]  # fmt: skip
    joined = [
        {**turn, "content": "".join(map(part_text, turn["content"]))}
        if isinstance(turn.get("content"), list)
        else turn
        for turn in turns
    ]
    if joined == turns:
        return turns
    text = template.attempt(turns)
    known = text is not None and all(part_text(part).strip() in text for part in parts)
    printed = text is not None and any(
        form in text
        for part in parts
        for form in (repr(part), json.dumps(part), json.dumps(part, ensure_ascii=False))
        if not isinstance(part, str)
    )
    listed = text is not None and any(
        repr(turn["content"]) in text for turn in turns if isinstance(turn.get("content"), list)
    )
    return turns if known and not printed and not listed else joined


def _notes(turns: Turns, template: _Template) -> frozenset[str]:
    """Return what the template leaves out; refuse calls that are all that a turn says."""
    source, notes = template.source, set()
    notes |= {name for name, value in template.beside.items() if value and name not in source}
    for number, turn in enumerate(turns, start=1):
        if "tool_calls" in turn and "tool_calls" not in source:
            if not turn.get("content"):
                raise DataError(
                    f"message {number} of {len(turns)} is a tool call, and the chat template has "
                    "no tool_calls: take a tokenizer whose template has them, or write calls as "
                    "text"
                )
            notes.add("tool_calls")
        if not any(name in source for name in _REASONING):
            notes |= {name for name in _REASONING if turn.get(name)}
    return frozenset(f"the chat template does not use {name}: it is not learned" for name in notes)


# ---- what is learned of it ----------------------------------------------------------------------


def _assistant_spans(turns: Turns, template: _Template) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendered conversation and the character ranges of its assistant turns."""
    text = template.render(turns)
    spans: list[tuple[int, int]] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant" or _is_silent(turn):
            continue
        after = spans[-1][1] if spans else 0
        span = _appended(text, turns, index, template)
        span = span or _probed(text, turns, index, template, after)
        if span is None:
            raise DataError(
                "the chat template rewrites earlier turns, so that what the assistant said cannot "
                f"be told from the rest (turn {index + 1} of {len(turns)}): give the tokenizer a "
                "template with {% generation %} marks, or end each conversation at its first answer"
            )
        spans.append(span)
    return text, spans


def _is_silent(turn: Mapping[str, Any]) -> bool:
    return not any(value and str(value).strip() for key, value in turn.items() if key != "role")


def _appended(text: str, turns: Turns, index: int, template: _Template) -> tuple[int, int] | None:
    """Return what a turn adds to the conversation before it with its generation prompt."""
    if index == 0:
        return None
    before = template.attempt(turns[:index], prompt=True)
    upto = template.attempt(turns[: index + 1])
    if before is None or upto is None:
        return None
    if not (text.startswith(upto) and upto.startswith(before)):
        return None
    return len(before), len(upto)


def _probed(
    text: str, turns: Turns, index: int, template: _Template, after: int
) -> tuple[int, int] | None:
    """Return the place of a turn's content, and of the marker behind it, by rendering another.

    The turn begins behind the generation prompt if it is there, else with its content: an opened
    `<think>` that the rendered turn does not have is not learned.
    """
    called = bool(turns[index].get("tool_calls")) and not turns[index].get("content")
    probe: Turns = [_other_call(turns[index]) if called else {**turns[index], "content": _PROBE}]
    whole = template.attempt([*turns[:index], *probe, *turns[index + 1 :]])
    last = template.attempt([*turns[:index], *probe])
    if whole is None or whole.count(_PROBE) != 1:
        return None
    head, tail = whole.split(_PROBE)
    shared = _shared(head, text)
    end = len(text) - len(tail)
    header = _generation_prompt(template)
    at = shared.rfind(header, after) if header else -1
    start = at + len(header) if at >= 0 else len(head)
    if at < 0 and (called or shared != head):
        return None
    if not text.endswith(tail) or end < max(start, after):
        return None
    marker = _shared_tokens(tail, last.split(_PROBE)[-1] if last else "", template.tokenizer)
    return start, end + len(marker)


def _other_call(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn that calls a tool of another name: some templates join content and calls."""
    first, *rest = turn["tool_calls"]
    named = (
        {**first, "function": {**first["function"], "name": _PROBE}}
        if isinstance(first.get("function"), Mapping)
        else {**first, "name": _PROBE}
    )
    return {**turn, "tool_calls": [named, *rest]}


def _shared(one: str, other: str) -> str:
    """Return how both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _shared_tokens(one: str, other: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return how both texts begin, in whole tokens: <|user|> and <|end|> begin with no same one."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    common, ids, others = _shared(one, other), tokens(one), tokens(other)
    while common:
        own = tokens(common)
        if own == ids[: len(own)] == others[: len(own)]:
            break
        common = common[:-1]
    return common


def _generation_prompt(template: _Template) -> str:
    """Return what the template appends for an answer to begin; empty if that cannot be seen."""
    question: Turns = [{"role": "user", "content": "x"}]
    bare, prompted = template.attempt(question), template.attempt(question, prompt=True)
    if bare is None or prompted is None or not prompted.startswith(bare):
        return ""
    return prompted[len(bare) :]


def _encode_spans(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Encode a rendered conversation; tokens that begin inside a span are learned."""
    if tokenizer.is_fast:
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = [
            any(start <= first < end for start, end in spans)
            for first, _ in coded["offset_mapping"]
        ]
        return list(coded["input_ids"]), learned
    # A slow tokenizer gives no offsets: what lies between two borders is encoded on its own.
    borders = sorted({0, len(text), *(border for span in spans for border in span)})
    ids: list[int] = []
    learned = []
    for start, end in itertools.pairwise(borders):
        piece = tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
        ids += piece
        learned += [any(first <= start < last for first, last in spans)] * len(piece)
    return ids, learned
