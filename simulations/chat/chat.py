"""`graft chat`: talks with a model until the user leaves."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from simulations.chat.commands import COMMANDS, Then, execute
from simulations.chat.dialogue import Dialogue
from simulations.chat.terminal import Lines, Screen, Terminal, history_file
from simulations.chat.told import told
from simulations.talk.speaker import Piece

logger = logging.getLogger(__name__)


def terminal() -> Terminal:
    """Return the user's terminal; plain lines if input or output is none."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return Screen(history_file(), list(COMMANDS))
    return Lines(sys.stdin, sys.stdout, sys.stderr)


class Chat:
    """Reads, answers and obeys."""

    def __init__(self, dialogue: Dialogue, terminal: Terminal) -> None:
        self._dialogue, self._terminal = dialogue, terminal
        self.failed = False
        """Whether something was refused or an answer failed."""

    def run(self) -> None:
        """Talk until the user leaves: /quit, Ctrl-D, the end of the input, or Ctrl-C twice."""
        interrupted = False
        while True:
            try:
                line = self._terminal.read()
                if line is None or self._take(line) is Then.LEAVE:
                    break
                interrupted = False
            except KeyboardInterrupt:
                if interrupted:
                    break
                interrupted = True
                self._terminal.note("Ctrl-C once more leaves, as Ctrl-D does.")
        self._farewell()

    def _take(self, line: str) -> Then:
        """Answer a message or obey a command; what is wrong is said, and the chat goes on."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                said, then = execute(self._dialogue, line)
                self._terminal.note(*said)
                if then is Then.ANSWER:
                    self._show(self._dialogue.retry)
                return then
            if line.strip():
                text = line.removeprefix("/")
                self._show(lambda cancelled: self._dialogue.ask(text, cancelled))
        except (ValueError, RuntimeError, OSError) as error:
            logger.info("a message or command failed", exc_info=error)
            self.failed = True
            self._terminal.note(str(error), wrong=True)
        return Then.GO_ON

    def _show(self, answer: Callable[[threading.Event], Iterator[Piece]]) -> None:
        """Show an answer as it comes; Ctrl-C ends it."""
        cancelled, last = threading.Event(), ""
        try:
            with self._terminal.answering(), _interrupts(cancelled):
                for piece in answer(cancelled):
                    self._terminal.write(piece.text)
                    last = piece.text or last
        finally:
            if not last.endswith("\n"):
                self._terminal.write("\n")
        self._remark()

    def _remark(self) -> None:
        finish, most = self._dialogue.finish, self._dialogue.sampling.max_tokens
        if finish == "cancelled":
            self._terminal.note("(stopped)")
        elif finish == "length" and self._dialogue.last.tokens < most:
            self._terminal.note(f"(the model takes {self._dialogue.speaker.context:,} tokens)")
        elif finish == "length":
            self._terminal.note(f"(the first {most} tokens: /max_tokens {2 * most} for more)")

    def _farewell(self) -> None:
        if self._dialogue.total.answers:
            self._terminal.note(*told(self._dialogue.total))


@contextmanager
def _interrupts(cancelled: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C end the answer, and another one what waits for it."""

    def interrupted(_number: int, _frame: Any) -> None:
        if cancelled.is_set():
            raise KeyboardInterrupt
        cancelled.set()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def greeting(dialogue: Dialogue) -> list[str]:
    """Return what is said at the beginning."""
    lines = [f"{dialogue.speaker.name}: /help shows the commands, Ctrl-D leaves."]
    if not dialogue.speaker.prompts.chats:
        lines.append("It has no chat template: it goes on with the text that you write.")
    return lines
