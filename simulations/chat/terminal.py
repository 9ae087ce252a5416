"""Where a chat is typed and shown: a terminal, or plain lines through pipes."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings
from rich.console import Console
from rich.table import Table
from rich.text import Text

HISTORY = "chat-history"


class Terminal(Protocol):
    """Takes what the user says and shows what is answered."""

    strict: bool
    """Whether a mistake counts in the end: nobody is there to mend it."""

    def read(self) -> str | None:
        """Return a message; None at the end. Ctrl-C raises KeyboardInterrupt."""

    def write(self, text: str) -> None:
        """Show a piece of an answer at once."""

    def answering(self) -> AbstractContextManager[None]:
        """Make ready for an answer."""

    def note(self, *lines: str, wrong: bool = False) -> None:
        """Say something about the chat; a tab in a line makes two columns."""


class Lines:
    """Each line of the input is a message; answers alone go to the output."""

    strict = True

    def __init__(self, given: TextIO, answers: TextIO, notes: TextIO) -> None:
        self._given, self._answers, self._notes = given, answers, notes

    def read(self) -> str | None:
        """Return the next line; None after the last."""
        line = self._given.readline()
        return line.rstrip("\n") if line else None

    def write(self, text: str) -> None:
        """Pass text on as it is."""
        self._answers.write(text)
        self._answers.flush()

    def answering(self) -> AbstractContextManager[None]:
        """Need nothing."""
        return nullcontext()

    def note(self, *lines: str, wrong: bool = False) -> None:
        """Put notes beside the answers."""
        for line in lines:
            self._notes.write(f"{'error: ' if wrong else ''}{line}\n".replace("\t", "  "))
        self._notes.flush()


class Screen:
    """A terminal: editing, history with arrow keys, Esc-Enter for a new line, Tab for commands."""

    strict = False

    def __init__(self, history: Path, commands: Sequence[str], **terminal: Any) -> None:
        self._session: PromptSession[str] = PromptSession(
            ANSI("\x1b[1;36m>\x1b[0m "),
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation="  ",
            history=FileHistory(str(_owned(history))),
            completer=_Commands(commands),
            complete_while_typing=False,
            **terminal,
        )
        self._console = Console(highlight=False, emoji=False)

    def read(self) -> str | None:
        """Let the user write; Ctrl-D on an empty line ends, Ctrl-C on another clears it."""
        try:
            return self._session.prompt()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if self._session.default_buffer.text:
                return ""
            raise

    def write(self, text: str) -> None:
        """Show text in which nothing can command the terminal."""
        sys.stdout.write(visible(text))
        sys.stdout.flush()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Keep what is typed meanwhile out of the answer; the next prompt has it."""
        before = termios.tcgetattr(sys.stdin)
        flags = before[3] & ~termios.ECHO | termios.NOFLSH  # Ctrl-C would throw it away
        quiet: list[Any] = [*before[:3], flags, *before[4:]]
        termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    def note(self, *lines: str, wrong: bool = False) -> None:
        """Print notes, dim or red, wrapped between words."""
        style = "red" if wrong else "dim"
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        for line in lines:
            first, tab, second = visible(line).partition("\t")
            if tab:
                table.add_row(first, Text(second, style=style))
            else:
                self._console.print(Text(first, style=style))
        if table.row_count:
            self._console.print(table)


def visible(text: str) -> str:
    """Return text with control characters as pictures: a model may say anything."""
    return text.translate(_PICTURES)


_PICTURES = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    127: "\u2421",
    **dict.fromkeys(range(128, 160), "�"),
}


def history_file() -> Path:
    """Return where what was typed is kept: in `$GRAFT_HOME`, by default `~/.graft`."""
    return Path(os.environ.get("GRAFT_HOME") or "~/.graft").expanduser() / HISTORY


def _owned(path: Path) -> Path:
    """Make a file that its owner alone can read, if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o600))
    path.chmod(0o600)
    return path


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _Commands(Completer):
    """Completes the name of a command."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def get_completions(self, document: Any, complete_event: Any) -> Any:
        typed = document.text_before_cursor
        if typed.startswith("/"):
            for name in self._names:
                if name.startswith(typed[1:]):
                    yield Completion(f"/{name}", start_position=-len(typed))
