"""The turns of a conversation as a file holds them: checked, as role and content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flower_app.data.formats import SPEAKERS, from_sharegpt
from flower_app.data.refusals import DataError

Turns = list[dict[str, Any]]

_PARTS = ("image", "image_url", "input_image", "audio", "input_audio", "video", "file", "tool_use",
          "tool_result", "thinking", "refusal")  # fmt: skip


def read_turns(messages: Any) -> Turns:
    """Return the turns as role and content; keys that hold nothing are left out."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(
            f"chat messages must be a list of {{role, content}}, got {type(messages).__name__}"
        )
    turns: Turns = []
    for number, turn in enumerate(messages, start=1):
        which = f"message {number} of {len(messages)}"
        if isinstance(turn, Mapping) and "role" not in turn and {"from", "value"} <= set(turn):
            turn = from_sharegpt(turn, which)
        if not isinstance(turn, Mapping) or "role" not in turn:
            what = "no role" if isinstance(turn, Mapping) else f"a {type(turn).__name__}"
            raise DataError(
                f"chat messages must be a list of {{role, content}}, got one with {what} ({which})"
            )
        read = {key: _content(value, which) if key == "content" else value
                for key, value in turn.items()}  # fmt: skip
        turns.append({key: value for key, value in read.items() if value is not None})
    roles = {turn["role"] for turn in turns if isinstance(turn.get("role"), str)}
    if "assistant" not in roles and roles & SPEAKERS:
        raise DataError(
            f"nobody in the conversation has the role assistant, but there is "
            f"{', '.join(sorted(roles & SPEAKERS))}: name the role assistant, or write turns as "
            "from and value (data.format=sharegpt)"
        )
    return turns


def _content(value: Any, which: str) -> Any:
    """Return text, a list of parts that are all text, or None; refuse anything else."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return getattr(value, "text", json.dumps(value))  # a number as the file writes it
    if not isinstance(value, list):
        raise DataError(
            f"content must be text or a list of parts, got {type(value).__name__} ({which})"
        )
    for part in value:
        part_text(part, which)
    return value


def part_text(part: Any, which: str = "") -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") in ("text", "input_text",
                                                                 "output_text"):  # fmt: skip
        text = part.get("text")
        if text is None or isinstance(text, str):
            return text or ""
    kind = part.get("type") if isinstance(part, Mapping) else None
    shown = kind if kind in _PARTS else "something else"
    raise DataError(f"content may have parts of text only, got {shown} ({which})")
