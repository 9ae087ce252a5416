"""a request for a chat completion: its messages and parameters, checked"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simulations.api.errors import unsupported, wrong
from simulations.api.fields import Fields
from simulations.api.wanted import MOST_LOGPROBS, NOWHERE, Wanted, one_of, shared

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
REFUSED = ("tools", "functions", "audio", "prediction", "web_search_options", "reasoning_effort")


@dataclass(frozen=True, kw_only=True)
class Chat(Wanted):
    """A request for a chat completion."""

    messages: tuple[dict[str, str], ...]


def read_chat(body: Any) -> Chat:
    """Read a request, or say what is wrong with it.

    Raises
    ------
    ApiError
        With the parameter that is wrong, not supported, or not known.
    """
    fields = Fields(body)
    _refuse(fields)
    asked, top = fields.flag("logprobs"), fields.whole("top_logprobs", None, 0, MOST_LOGPROBS)
    if top is not None and not asked:
        raise wrong("top_logprobs", "is allowed only with logprobs=true")
    chat = Chat(
        messages=_messages(fields.take("messages")),
        max_tokens=one_of(fields, "max_tokens", "max_completion_tokens"),
        top_logprobs=(top or 0) if asked else None,
        **shared(fields),
    )
    fields.finish()
    return chat


def _refuse(fields: Fields) -> None:
    for name in REFUSED:
        fields.only(name, [], why=NOWHERE)
    fields.only("tool_choice", "none", "auto", why="asks for tools, which are not supported")
    fields.only("function_call", "none", "auto", why="asks for functions, which are not supported")
    fields.only("parallel_tool_calls", True, False, why=NOWHERE)
    fields.only("response_format", {"type": "text"}, why="is not supported: answers are text")
    fields.only("modalities", ["text"], why="is not supported: answers are text")
    fields.only("verbosity", "medium", why=NOWHERE)


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if value is None:
        raise wrong("messages", "is missing", "missing_required_parameter")
    if not isinstance(value, list) or not value:
        raise wrong("messages", "is to be an array of one message or more", "invalid_type")
    return tuple(_message(one, f"messages[{place}]") for place, one in enumerate(value))


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise wrong(where, "is to be an object with role and content", "invalid_type")
    role = value.get("role")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise unsupported(f"{where}.role", f"{role!r} is not supported; there are {known}")
    others = [name for name in value if name not in ("role", "content") and value[name]]
    if others:
        raise unsupported(f"{where}.{others[0]}", NOWHERE)
    return {"role": ROLES[role], "content": _content(value.get("content"), f"{where}.content")}


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong(where, "is to be a string, or an array of text parts", "invalid_type")
    return "".join(_part(one, f"{where}[{place}]") for place, one in enumerate(value))


def _part(value: Any, where: str) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind != "text":
        raise unsupported(where, f"a part of type {kind!r} is not supported; there is text")
    if not isinstance(value.get("text"), str):
        raise wrong(f"{where}.text", "is no string", "invalid_type")
    return str(value["text"])
