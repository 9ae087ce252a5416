"""A chat with a tiny model, typed by a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from simulations.chat.chat import Chat
from simulations.chat.dialogue import Dialogue
from simulations.talk.speaker import Sampling, Speaker
from tests.simulations.talk.helpers import CHATML, byte_level, speaker, tiny


class Script:
    """Types lines, in order; an exception among them is raised in place of a line.

    `on_text` is called with the first piece of each answer.
    """

    strict = True

    def __init__(self, lines: Sequence[Any], on_text: Callable[[], None] = lambda: None) -> None:
        self._lines, self._on_text, self._fresh = list(lines), on_text, False
        self.text, self.notes, self.errors = "", list[str](), list[str]()

    def read(self) -> str | None:
        line, self._fresh = self._lines.pop(0) if self._lines else None, True
        if isinstance(line, type):
            raise line
        return line

    def write(self, text: str) -> None:
        self.text += text
        if self._fresh:
            self._fresh = False
            self._on_text()

    def answering(self) -> Any:
        return nullcontext()

    def note(self, *lines: str, wrong: bool = False) -> None:
        (self.errors if wrong else self.notes).extend(lines)


def dialogue(talker: Speaker | None = None, **sampling: Any) -> Dialogue:
    settings = Sampling(**{"temperature": 0.0, "max_tokens": 6, **sampling})
    told = list[str]()
    made = Dialogue(speaker=talker or speaker(), sampling=settings, notice=told.append)
    made.told = told  # type: ignore[attr-defined]
    return made


def chatting(context: int = 256) -> Speaker:
    """A model with a chat template."""
    return Speaker(tiny(context), byte_level(CHATML), "tiny-chat")


def talk(dialogue: Dialogue, *lines: Any, **script: Any) -> tuple[Chat, Script]:
    place = Script(lines, **script)
    chat = Chat(dialogue, place)
    chat.run()
    return chat, place


def said(dialogue: Dialogue) -> list[tuple[str, str]]:
    return [(one["role"], one["content"]) for one in dialogue.messages]
