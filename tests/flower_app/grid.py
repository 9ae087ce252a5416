"""Flower's grid, in this process: messages reach the real ClientApp, without SuperLink or Ray."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from flower_app.client_app import app
from strategies.transport.link import StepCounters
from strategies.transport.stream.link import GrpcLink

_thread = threading.local()


class Vanished(BaseException):
    """A client's process is gone; no code of its own may catch this."""


class WatchedLink(GrpcLink):
    """A client's link in a test of `dying` or `before_step`: put it in place of the ClientApp's."""

    def apply(self, step: int, counters: StepCounters, gradients: Any = None) -> None:
        if hook := getattr(_thread, "before_step", None):
            hook(step)
        super().apply(step, counters, gradients)


def _vanish_at(last: int) -> Callable[[int], None]:
    def vanish(step: int) -> None:
        if step == last:
            raise Vanished

    return vanish


@dataclass
class InProcessGrid(Grid):
    """Runs each message's client in turn, as it is pushed; its reply waits to be pulled.

    `absent` nodes never answer; `broken` ones meet an exception outside Graft's code; `dying` ones
    vanish in training after so many steps; `held` ones train in a thread of their own, once their
    event is set. `before_step` is called with each step that a node is about to apply, `meanwhile`
    before each message is delivered.
    """

    clients: int = 2
    node_configs: dict[int, dict[str, Any]] = field(default_factory=dict)
    first_id: int = 100
    present: set[int] | None = None
    absent: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    dying: dict[int, int] = field(default_factory=dict)
    before_step: dict[int, Callable[[int], None]] = field(default_factory=dict)
    held: dict[int, threading.Event] = field(default_factory=dict)
    meanwhile: Callable[[Message], None] = lambda message: None
    seen: list[Message] = field(default_factory=list)
    states: dict[int, RecordDict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ids = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self.threads: list[threading.Thread] = []

    def get_node_ids(self) -> Iterable[int]:
        numbers = range(self.clients) if self.present is None else self.present
        return [self.first_id + number for number in numbers]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        taken, in_turn = [], []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._ids)}"
            taken.append(message.metadata.message_id)
            event = self.held.get(self._number(message))
            if event is None or message.metadata.message_type != "train":
                in_turn.append(message)
            else:
                thread = threading.Thread(target=self._work_later, args=(message, event))
                thread.start()
                self.threads.append(thread)
        for message in in_turn:
            self._work(message)
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
        state = self.states.setdefault(number, RecordDict())
        context = Context(1, message.metadata.dst_node_id, config, state, {})
        return self._act(message, context)

    def _act(self, message: Message, context: Context) -> Message | None:
        """Let the client work, with what is to happen before its steps."""
        number = self._number(message)
        _thread.before_step = self.before_step.get(number)
        if number in self.dying and message.metadata.message_type == "train":
            _thread.before_step = _vanish_at(self.dying[number])
        try:
            return app(message, context)
        except Vanished:
            return None
        finally:
            _thread.before_step = None

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
