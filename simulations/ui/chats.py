"""Each browser session's conversation: opened when it first asks, freed when its tab closes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from simulations.talk.speaker import Conversation

MOST = 32
"""Conversations that are kept; of more the one longest idle is freed, and computed anew if used."""
PATIENCE = 30.0
"""Seconds that an answer has to end after the token that is being made."""


class Chat:
    """One conversation and the answer that is being made in it."""

    def __init__(self) -> None:
        self.conversation = Conversation()
        self.used = time.monotonic()
        self._turn = threading.Lock()
        self._current = threading.Event()

    @property
    def answering(self) -> bool:
        """Whether an answer is being made."""
        return self._turn.locked()

    def stop(self) -> None:
        """End the answer after the token that is being made."""
        self._current.set()

    def is_current(self, turn: threading.Event) -> bool:
        """Whether no newer answer has been asked for."""
        return self._current is turn

    @contextmanager
    def turn(self) -> Iterator[threading.Event]:
        """End the answer before, and hold the conversation for one; the event cancels it."""
        cancelled, before = threading.Event(), self._current
        self._current = cancelled
        before.set()
        if not self._turn.acquire(timeout=PATIENCE):
            raise ValueError(
                f"the answer before this has not ended within {PATIENCE:.0f} s; wait a little and "
                "press Retry"
            )
        try:
            yield cancelled
        finally:
            self.used = time.monotonic()
            self._turn.release()

    def leave(self) -> None:
        """End the answer, which shows nothing more; one that hangs is left to end by itself."""
        before, self._current = self._current, threading.Event()
        before.set()
        if self._turn.acquire(timeout=PATIENCE):
            self._turn.release()

    def free(self) -> None:
        """End the answer, and forget what is cached."""
        self.leave()
        if not self.answering:
            self.conversation.drop()


class Chats:
    """The chats by the browser session that each belongs to."""

    def __init__(self, most: int = MOST) -> None:
        self._chats: dict[str, Chat] = {}
        self._most = most
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._chats)

    def of(self, session: str) -> Chat:
        """Return a session's chat, a new one if it has none."""
        with self._lock:
            chat = self._chats.get(session) or Chat()
            self._chats[session] = chat
            idle = [
                key for key, one in self._chats.items() if one is not chat and not one.answering
            ]
            many = len(self._chats) > self._most and idle
            oldest = min(idle, key=lambda key: self._chats[key].used) if many else None
            surplus = self._chats.pop(oldest) if oldest is not None else None
        if surplus is not None:
            surplus.free()
        return chat

    def stop(self, session: str) -> None:
        """End a session's answer, if one is being made."""
        if chat := self._chats.get(session):
            chat.stop()

    def leave(self, session: str) -> None:
        """End a session's answer for something else: it shows nothing more."""
        if chat := self._chats.get(session):
            chat.leave()

    def free(self, session: str) -> None:
        """Forget a session."""
        with self._lock:
            chat = self._chats.pop(session, None)
        if chat is not None:
            chat.free()
