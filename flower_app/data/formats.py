"""What a row is, by data.format or by its columns: a text, a prompt with its answer, a chat."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from conf.schema import DataConfig
from flower_app.data.refusals import NAME, DataError, shown_names
from flower_app.data.tables import separator

BESIDE = ("tools", "documents")
"""Columns beside the messages that a chat template takes."""
UNUSED = ("system", "system_prompt", "history", "functions", "images", "chat_template_kwargs")
"""Columns that other trainers read, and that are named if they are there."""

_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


@dataclass(frozen=True)
class Layout:
    """How the rows of one source are read."""

    kind: str
    """text, prompt, alpaca, or messages (sharegpt too: its turns are told by their keys)."""
    columns: Mapping[str, str]
    """Needed columns by what they are for: `text_column`, `prompt_column`, ..."""
    optional: tuple[str, ...] = ()


def layouts(config: DataConfig) -> dict[str, Layout]:
    """Return the formats that the rows may have under a configuration, with their columns."""
    chat, prompt = config.messages_column, config.prompt_column
    known = {
        "text": Layout("text", {"text_column": config.text_column}),
        "prompt": Layout(
            "prompt",
            {
                "prompt_column": prompt or "prompt",
                "completion_column": config.completion_column or "completion",
            },
        ),
        "messages": Layout("messages", {"messages_column": chat or "messages"}, BESIDE),
        "sharegpt": Layout("messages", {"messages_column": chat or "conversations"}, BESIDE),
        "alpaca": Layout("alpaca", {"instruction": "instruction", "output": "output"}, ("input",)),
    }
    named = config.format
    if named == "auto":
        named = "messages" if chat else "prompt" if prompt else named
    if named == "auto" and config.text_column != "text":
        named = "text"
    return known if named == "auto" else {named: known[named]}


def wanted(config: DataConfig) -> set[str]:
    """Return all columns that may be used, before it is known which there are."""
    names = {config.partition_by} - {""}
    for layout in layouts(config).values():
        names |= {*layout.columns.values(), *layout.optional, *UNUSED}
    return names


def recognise(config: DataConfig, columns: Collection[str], where: str) -> Layout:
    """Return what the rows are.

    Raises
    ------
    DataError
        If the columns are those of no format, or of several.
    """
    possible = layouts(config)
    found = {
        name: layout
        for name, layout in possible.items()
        if set(layout.columns.values()) <= set(columns)
    }
    if len(found) > 1:
        raise DataError(
            f"{where} could be read as {' or as '.join(found)}: set data.format to the one that is "
            f"meant; it has {shown_names(list(columns))}"
        )
    if found:
        return next(iter(found.values()))
    layout, *others = possible.values()
    before = f" is none of {', '.join(list(possible)[1:])} (data.format), and" if others else ""
    key, column = next(item for item in layout.columns.items() if item[1] not in columns)
    key = f"data.{key}" if key.endswith("_column") else f"data.format={layout.kind}"
    raise no_column(key, column, columns, where + before)


def no_column(key: str, column: str, columns: Collection[str], where: str) -> DataError:
    """Return the error of a column that is not there, with those that are."""
    names = list(columns)
    near = difflib.get_close_matches(column, [name for name in names if NAME.fullmatch(name)], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else separator(names)
    return DataError(f"{where} has no column {column!r} ({key}); it has {shown_names(names)}{hint}")


@lru_cache(maxsize=32)
def layout_of(config: DataConfig, columns: tuple[str, ...]) -> Layout:
    """Return what a row is that has these columns."""
    return recognise(config, columns, "the row")


def alpaca_prompt(instruction: str, given: str) -> str:
    """Return the prompt of Stanford Alpaca, with the input or without one."""
    paired = ", paired with an input that provides further context" if given.strip() else ""
    shown = f"### Input:\n{given}\n\n" if given.strip() else ""
    return _ALPACA.format(paired=paired, instruction=instruction, input=shown)


_NAMES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bot": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant",
    "system": "system",
    "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool",
}  # fmt: skip
SPEAKERS = frozenset(_NAMES) - {"user", "assistant", "system", "tool", "function"}


def from_sharegpt(turn: Mapping[str, Any], which: str) -> dict[str, Any]:
    """Return a turn of from/value as one of role/content.

    Raises
    ------
    DataError
        If who speaks is not known.
    """
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in _NAMES:
        raise DataError(
            f"who speaks in {which} is not known: `from` must be one of {', '.join(_NAMES)}"
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": _NAMES[speaker], "content": turn["value"], **rest}
