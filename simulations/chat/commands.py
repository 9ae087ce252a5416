"""The commands of a chat: what begins with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from simulations.chat.dialogue import Dialogue
from simulations.chat.saved import save
from simulations.chat.told import told


class Then(Enum):
    """What follows a command."""

    GO_ON = "go on"
    ANSWER = "answer the last question anew"
    LEAVE = "leave"


Done = tuple[list[str], Then]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command, with what it takes and what it does."""

    name: str
    takes: str = ""
    does: str
    run: Callable[[Dialogue, str], Done]


def execute(dialogue: Dialogue, line: str) -> Done:
    """Do what a line asks for that begins with a slash.

    Raises
    ------
    ValueError
        If there is no such command, or the value is wrong.
    """
    name, _, value = line[1:].strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        alike = [other for other in COMMANDS if len(name) > 2 and other.startswith(name[:3])]
        near = alike or difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        meant = f"did you mean /{near[0]}? " if near else ""
        raise ValueError(
            f"no command /{name}: {meant}/help lists them; a message that begins with a slash is "
            "written with two"
        )
    if value.strip() and not command.takes:
        raise ValueError(f"/{name} takes no value, and {value.strip()!r} was given")
    return command.run(dialogue, value.strip())


def _help(dialogue: Dialogue, _: str) -> Done:
    return [f"/{one.name} {one.takes}".strip() + f"\t{one.does}" for one in COMMANDS.values()], (
        Then.GO_ON
    )


def _stats(dialogue: Dialogue, _: str) -> Done:
    lines = told(dialogue.last)
    if dialogue.total.answers > 1:
        lines += ["all answers:", *told(dialogue.total)]
    if dialogue.total.answers and not dialogue.total.parts:
        lines.append("The model is not split.")
    return lines, Then.GO_ON


def _reset(dialogue: Dialogue, _: str) -> Done:
    dialogue.reset()
    return ["A new chat."], Then.GO_ON


def _undo(dialogue: Dialogue, _: str) -> Done:
    question = dialogue.undo()
    return [f"Taken back, with its answer: {_short(question)}"], Then.GO_ON


def _retry(dialogue: Dialogue, _: str) -> Done:
    if not dialogue.messages:
        raise ValueError("nothing has been said yet: there is nothing to answer anew")
    return [], Then.ANSWER


def _system(dialogue: Dialogue, value: str) -> Done:
    if value == "-":
        dialogue.instruct("")
        return ["No system message."], Then.GO_ON
    if value:
        dialogue.instruct(value)
    said = f"System message: {dialogue.system}" if dialogue.system else "No system message."
    return [said], Then.GO_ON


def _save(dialogue: Dialogue, value: str) -> Done:
    if not value:
        raise ValueError("/save takes the name of a file: /save chat.json")
    path = Path(value).expanduser()
    save(dialogue, path)
    return [f"Saved to {path.absolute()}; --load goes on with it."], Then.GO_ON


def _quit(dialogue: Dialogue, _: str) -> Done:
    return [], Then.LEAVE


def _setting(name: str, read: Callable[[str], Any], wanted: str) -> Callable[[Dialogue, str], Done]:
    def run(dialogue: Dialogue, value: str) -> Done:
        if value:
            try:
                found = read(value)
            except ValueError:
                raise ValueError(f"/{name} takes {wanted}, not {value!r}") from None
            dialogue.set(**{name: found})
        return [f"{name}: {_shown(getattr(dialogue.sampling, name))}"], Then.GO_ON

    return run


def _seed(text: str) -> int | None:
    return None if text == "-" else int(text)


def _stops(text: str) -> tuple[str, ...]:
    """Read texts with spaces between; `\\n` is a new line, `-` is none."""
    return () if text == "-" else tuple(one.replace("\\n", "\n") for one in text.split())


def _shown(value: Any) -> str:
    if value is None:
        return "another each time"
    if isinstance(value, tuple):
        return " ".join(repr(one) for one in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


COMMANDS = {
    one.name: one
    for one in (
        Command(name="help", does="these commands", run=_help),
        Command(name="stats", does="tokens a second, milliseconds by part, bytes", run=_stats),
        Command(
            name="temperature", takes="0.7", does="0: always the likeliest token",
            run=_setting("temperature", float, "a number of 0 or more"),
        ),
        Command(
            name="top_p", takes="0.9", does="of the likeliest tokens that make up this much",
            run=_setting("top_p", float, "a number above 0 and at most 1"),
        ),
        Command(
            name="top_k", takes="40", does="of this many of the likeliest tokens; 0: all",
            run=_setting("top_k", int, "a whole number"),
        ),
        Command(
            name="max_tokens", takes="256", does="length of an answer at most",
            run=_setting("max_tokens", int, "a whole number of 1 or more"),
        ),
        Command(
            name="seed", takes="1", does="the same answer each time; -: another each time",
            run=_setting("seed", _seed, "a whole number, or - for another each time"),
        ),
        Command(
            name="stop", takes="END \\n\\n", does="an answer ends before one of these; -: none",
            run=_setting("stop", _stops, "texts with spaces between"),
        ),
        Command(name="system", takes="TEXT", does="the system message; -: none", run=_system),
        Command(name="reset", does="begin a new chat", run=_reset),
        Command(name="undo", does="take back the last question and its answer", run=_undo),
        Command(name="retry", does="answer the last question anew", run=_retry),
        Command(name="save", takes="FILE", does="write the chat as JSON", run=_save),
        Command(name="quit", does="leave, as Ctrl-D does", run=_quit),
    )
}  # fmt: skip
"""In the order in which /help shows them."""
