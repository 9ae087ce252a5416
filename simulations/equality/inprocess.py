"""The whole app in this process: both Flower apps, without SuperLink, SuperNodes or Ray."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file
from torch import Tensor

from conf.schema import Config
from flower_app import client_app
from flower_app.runs.recorder import Recorder
from flower_app.server_app import run_experiment


class InProcessGrid(Grid):
    """Brings each message to the real ClientApp.

    Parameters
    ----------
    clients : int
        How many nodes there are.
    at_once : bool
        Clients work in threads of their own, as `merged` needs it over the stream. Otherwise in
        turn: with messages they share what a process keeps from one message to the next.
    app : ClientApp
        Answers the messages.
    run_config : mapping, optional
        The app's, for a client that reads it; Graft's does not.
    """

    def __init__(
        self,
        clients: int,
        *,
        at_once: bool,
        app: ClientApp = client_app.app,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._app, self._run_config = app, dict(run_config or {})
        self._clients, self._at_once, self._ids = clients, at_once, itertools.count(1)
        self._states: dict[int, RecordDict] = {}
        self._replies: dict[str, Message] = {}
        self.threads: list[threading.Thread] = []

    def get_node_ids(self) -> Iterable[int]:
        """The nodes are called 1, 2, ..."""
        return range(1, self._clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the clients begin."""
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._ids)}"
            pushed.append(message)
        for message in pushed:
            if self._at_once:
                thread = threading.Thread(target=self._work, args=(message,), daemon=True)
                self.threads = [each for each in self.threads if each.is_alive()] + [thread]
                thread.start()
            else:
                self._work(message)
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def _work(self, message: Message) -> None:
        node = message.metadata.dst_node_id
        state = self._states.setdefault(node, RecordDict())
        config: dict[str, Any] = {"partition-id": node - 1, "num-partitions": self._clients}
        reply = self._app(message, Context(1, node, config, state, self._run_config))
        self._replies[message.metadata.message_id] = reply

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not called by Graft."""
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Not called by Graft."""
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        """Not called by Graft."""
        raise NotImplementedError

    @property
    def run(self) -> Any:
        """Not called by Graft."""
        raise NotImplementedError


def run_app(config: Config, clients: int) -> dict[str, Tensor]:
    """Run an experiment from its configuration to the saved model.

    Parameters
    ----------
    config : Config
        `output.folder` should be a temporary one.
    clients : int
        Simulated clients, each with its own partition of the data.

    Returns
    -------
    dict
        The tensors that the run saved: of the whole model, or of the adapters alone.

    Raises
    ------
    RuntimeError
        If a round has no quorum, with every client's reason.
    """
    with as_flower_runs_it():
        recorder = Recorder(config, say=lambda line: None)
        grid = InProcessGrid(clients, at_once=config.link.transport == "stream")
        folder = run_experiment(config, grid, recorder)
    assert folder is not None, "output.save_model is off"
    return read_tensors(folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's or an adapter's folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@contextmanager
def as_flower_runs_it() -> Iterator[None]:
    """The identity that Flower gives an app's process, and its log without news."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
