"""What is said in a chat, how it is answered, and what that took."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from simulations.talk.speaker import Conversation, Figures, Piece, Sampling, Speaker

PLAIN: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95}
"""How a model is sampled that does not say how itself."""


@dataclass(kw_only=True)
class Dialogue:
    """Messages and settings of a chat, and the answers to them.

    An answer that fails leaves the chat as it was before the question.
    """

    speaker: Speaker
    sampling: Sampling
    notice: Callable[[str], None]
    """Told what the user should know."""
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    last: Figures = field(default_factory=Figures)
    total: Figures = field(default_factory=Figures)
    finish: str = ""
    """Of the last answer."""
    _conversation: Conversation = field(default_factory=Conversation)
    _forgotten: int = 0

    def ask(self, text: str, cancelled: threading.Event | None = None) -> Iterator[Piece]:
        """Say something and stream the answer."""
        self.messages.append({"role": "user", "content": text})
        try:
            yield from self._answer(cancelled)
        finally:
            if self.messages and self.messages[-1]["role"] == "user":
                self.messages.pop()

    def retry(self, cancelled: threading.Event | None = None) -> Iterator[Piece]:
        """Answer the last question anew; if that fails, the old answer stays."""
        old = self.messages[-2:]
        question = self.undo()
        before = len(self.messages)
        try:
            yield from self.ask(question, cancelled)
        finally:
            if len(self.messages) == before:
                self.messages.extend(old)

    def undo(self) -> str:
        """Take the last question and its answer back; return the question."""
        if not self.messages:
            raise ValueError("nothing has been said yet")
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        self._forgotten = min(self._forgotten, len(self.messages))
        return question

    def reset(self) -> None:
        """Begin anew, with the same settings and system message."""
        self.messages.clear()
        self._forgotten = 0

    def instruct(self, text: str) -> None:
        """Set the system message, or none; refused if the model's template takes none."""
        if text:
            said = {"role": "user", "content": "Hello"}
            self.speaker.prompt([{"role": "system", "content": text}, said])
        self.system = text

    def set(self, **changes: Any) -> None:
        """Change settings, all or none of them."""
        self.sampling = replace(self.sampling, **changes)

    def _answer(self, cancelled: threading.Event | None) -> Iterator[Piece]:
        ids, text = self._prompt(), ""
        stream = self.speaker.stream(
            ids, self.sampling, cancelled=cancelled, conversation=self._conversation
        )
        for piece in stream:
            text += piece.text
            yield piece
        assert piece.figures is not None
        self.finish, self.last = piece.finish, piece.figures
        self.total = self.total + piece.figures
        if text or piece.finish != "cancelled":
            self.messages.append({"role": "assistant", "content": text})

    def _prompt(self) -> list[int]:
        """Return what the answer follows; the oldest is left out, and that told, if need be."""
        before, ids = self._forgotten, self._written()
        context = self.speaker.context
        if context is None or len(ids) + min(self.sampling.max_tokens, context // 4) <= context:
            return ids
        while len(ids) > context // 2 and self._forgotten + 2 < len(self.messages):
            self._forgotten += 2
            ids = self._written()
        if self._forgotten > before:
            self.notice(
                f"The model takes {context:,} tokens: the first {self._forgotten} messages of this "
                "chat no longer fit and are left out."
            )
        return ids

    def _written(self) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.speaker.prompt([*system, *self.messages[self._forgotten :]])


def sampling_of(speaker: Speaker) -> Sampling:
    """Return the model's own settings; `PLAIN` ones for a model that has none."""
    own = speaker.model.generation_config.temperature is not None
    return speaker.defaults if own else replace(speaker.defaults, **PLAIN)
