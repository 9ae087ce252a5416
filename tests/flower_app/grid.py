"""Flower's grid, in this process: messages reach the real ClientApp, without SuperLink or Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from flower_app.client_app import app


@dataclass
class InProcessGrid(Grid):
    """Runs each message's client in turn.

    `absent` nodes never answer; `broken` ones meet an exception outside Graft's code; `meanwhile`
    is called before each message is delivered.
    """

    clients: int = 2
    node_configs: dict[int, dict[str, Any]] = field(default_factory=dict)
    first_id: int = 100
    absent: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    meanwhile: Callable[[Message], None] = lambda message: None
    seen: list[Message] = field(default_factory=list)

    def get_node_ids(self) -> Iterable[int]:
        return range(self.first_id, self.first_id + self.clients)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return [reply for message in messages if (reply := self._deliver(message)) is not None]

    def _deliver(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        number = node - self.first_id
        self.seen.append(message)
        self.meanwhile(message)
        if number in self.absent:
            return None
        if number in self.broken:
            return Message(Error(code=7, reason="the process was killed"), reply_to=message)
        config = {"partition-id": number, "num-partitions": self.clients}
        config = self.node_configs.get(number, config)
        context = Context(1, node, config, RecordDict(), {})
        return app(message, context)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError
