"""Flower's grid, in this process: messages reach the real ClientApp, without SuperLink or Ray."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from flower_app.client_app import app
from strategies.transport.link import GrpcLink


class Vanished(BaseException):
    """A client's process is gone; no code of its own may catch this."""


@dataclass
class InProcessGrid(Grid):
    """Runs each message's client in turn, as it is pushed; its reply waits to be pulled.

    `absent` nodes never answer; `broken` ones meet an exception outside Graft's code; `dying` ones
    vanish in training after so many steps, their stream open; `held` ones get to work in a thread
    of their own, once their event is set. `meanwhile` is called before each message is delivered.
    """

    clients: int = 2
    node_configs: dict[int, dict[str, Any]] = field(default_factory=dict)
    first_id: int = 100
    present: set[int] | None = None
    absent: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    dying: dict[int, int] = field(default_factory=dict)
    held: dict[int, threading.Event] = field(default_factory=dict)
    meanwhile: Callable[[Message], None] = lambda message: None
    seen: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ids = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self.threads: list[threading.Thread] = []

    def get_node_ids(self) -> Iterable[int]:
        numbers = range(self.clients) if self.present is None else self.present
        return [self.first_id + number for number in numbers]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        taken = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._ids)}"
            taken.append(message.metadata.message_id)
            event = self.held.get(self._number(message))
            if event is None or message.metadata.message_type != "train":
                self._work(message)
            else:
                thread = threading.Thread(target=self._work_later, args=(message, event))
                thread.start()
                self.threads.append(thread)
        return taken

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def _work_later(self, message: Message, event: threading.Event) -> None:
        event.wait(30)
        self._work(message)

    def _work(self, message: Message) -> None:
        reply = self._deliver(message)
        if reply is not None:
            self._replies[message.metadata.message_id] = reply

    def _number(self, message: Message) -> int:
        return message.metadata.dst_node_id - self.first_id

    def _deliver(self, message: Message) -> Message | None:
        number = self._number(message)
        self.seen.append(message)
        self.meanwhile(message)
        if number in self.absent:
            return None
        if number in self.broken:
            return Message(Error(code=7, reason="the process was killed"), reply_to=message)
        config = {"partition-id": number, "num-partitions": self.clients}
        config = self.node_configs.get(number, config)
        context = Context(1, message.metadata.dst_node_id, config, RecordDict(), {})
        if number in self.dying and message.metadata.message_type == "train":
            self._die(message, context, self.dying[number])
            return None
        return app(message, context)

    def _die(self, message: Message, context: Context, after: int) -> None:
        """Let the client train, really, until its next step is due to be applied."""
        apply = GrpcLink.apply

        def vanish(link: GrpcLink, step: int, *args: Any, **kwargs: Any) -> None:
            if step == after:
                raise Vanished
            apply(link, step, *args, **kwargs)

        with mock.patch.object(GrpcLink, "apply", vanish):
            try:
                app(message, context)
            except Vanished:
                return
        raise AssertionError(f"the client did not come to step {after}")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError
