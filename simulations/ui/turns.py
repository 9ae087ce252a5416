"""A chat's messages, and what asking, trying again, taking back and editing make of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Messages = list[dict[str, str]]

USER, ASSISTANT = "user", "assistant"


def read(shown: Iterable[Mapping[str, Any]] | None) -> Messages:
    """Return role and text of what the browser shows."""
    return [{"role": str(one["role"]), "content": _text(one["content"])} for one in shown or ()]


def ask(messages: Messages, text: str) -> Messages:
    """Add what the user says."""
    return [*messages, {"role": USER, "content": text}]


def answered(messages: Messages, text: str) -> Messages:
    """Add what the model says."""
    return [*messages, {"role": ASSISTANT, "content": text}]


def again(messages: Messages) -> Messages:
    """Take the last answer away; what the user said last is to be answered anew."""
    asked = [place for place, one in enumerate(messages) if one["role"] == USER]
    if not asked:
        raise ValueError("there is no answer to try again: write something first")
    return messages[: asked[-1] + 1]


def undone(messages: Messages) -> tuple[Messages, str]:
    """Take the last question and its answer away, and return what the question was."""
    asked = again(messages)
    return asked[:-1], asked[-1]["content"]


def edited(messages: Messages, place: int, text: str) -> tuple[Messages, bool]:
    """Put a text in place of a message's and cut away what follows.

    Returns
    -------
    tuple
        The messages that are left, and whether they are to be answered now: an answer that was
        edited is not.
    """
    if not 0 <= place < len(messages):
        raise ValueError("the message that was edited is gone: load the page again")
    role = messages[place]["role"]
    if role == USER and not text.strip():
        raise ValueError("an empty message cannot be answered; the chat stays as it was")
    return [*messages[:place], {"role": role, "content": text}], role == USER


def prompt(messages: Sequence[Mapping[str, str]], system: str) -> list[Mapping[str, str]]:
    """Return what the model is given: the system prompt, if there is one, and the chat."""
    first = [{"role": "system", "content": system.strip()}] if system.strip() else []
    return [*first, *messages]


def _text(content: Any) -> str:
    """The text of a message, which Gradio hands over in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        return str(content.get("text") or "")
    return "".join(_text(part) for part in content)
