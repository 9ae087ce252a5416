"""Both apps in this process, with every byte of Flower's messages counted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import recorddict_to_proto

from conf.schema import Config
from flower_app.runs.recorder import Recorder
from flower_app.server_app import run_experiment
from simulations.bench.compare.fedavg import app as fedavg
from simulations.bench.compare.settings import FEDAVG, write_config
from simulations.equality.inprocess import InProcessGrid, as_flower_runs_it
from strategies.events import Event, RoundTrained


class CountingGrid(InProcessGrid):
    """Counts what the messages hold, as Flower serializes it, by their type."""

    def __init__(self, clients: int, **how: Any) -> None:
        super().__init__(clients, **how)
        self.down: dict[str, int] = {}
        """Bytes to the clients."""
        self.up: dict[str, int] = {}
        self.answered = 0.0
        """When the last reply was given to the server."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the clients begin."""
        return super().push_messages(_counted(messages, self.down))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come."""
        replies = list(_counted(super().pull_messages(message_ids), self.up))
        if replies:
            self.answered = time.monotonic()
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """What Flower's own strategies call."""
        return self.pull_messages(list(self.push_messages(messages)))


def count_quickly(config: Config, method: str, folder: Path) -> dict[str, float]:
    """Do what `count_round` does, in as few steps and examples as give the same counts."""
    few = config.train.batch_size * 10
    config = replace(config, data=replace(config.data, max_examples=few))
    if config.link.transport == "stream":  # no step takes a message
        config = replace(config, train=replace(config.train, local_steps=1))
    return count_round(config, method, folder)


def count_round(config: Config, method: str, folder: Path) -> dict[str, float]:
    """Count what Flower's messages of the second of two rounds hold, run in this process.

    In the first one there is nothing to send to Graft's clients: they start from the adapter.

    Parameters
    ----------
    config : Config
        Of `config_of`.
    method : str
        One of `METHODS`, not central.
    folder : Path
        For the run folder; made.

    Returns
    -------
    dict
        ``flower_up`` and ``flower_down``: bytes of a client's training messages in the round;
        ``averaging``: seconds from the last answer to the averaged model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = replace(config.train, rounds=2)
    output = replace(config.output, folder=str(folder))
    config = replace(config, train=train, output=output)
    with as_flower_runs_it():
        found = _fedavg(config, folder) if method == FEDAVG else _graft(config)
    return found


def _graft(config: Config) -> dict[str, float]:
    clients = config.federation.min_clients
    grid = CountingGrid(clients, at_once=config.link.transport == "stream")
    recorder = _Watched(config, grid)
    run_experiment(config, grid, recorder)
    return recorder.found


def _fedavg(config: Config, folder: Path) -> dict[str, float]:
    clients = config.federation.min_clients
    path = write_config(config, folder / "fedavg.yaml")
    run_config = {"experiment": str(path)}
    grid = CountingGrid(clients, at_once=False, app=fedavg.client, run_config=run_config)
    fedavg.server(grid, Context(1, 0, {}, RecordDict(), dict(run_config)))
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    sums = {"up": grid.up["train"], "down": grid.down["train"]}
    found = {
        f"flower_{name}": count / config.train.rounds / clients for name, count in sums.items()
    }
    return found | {"averaging": history[-1]["averaging"]}


class _Watched(Recorder):
    """Takes the counts between two rounds, and the time from the last answer to the average."""

    def __init__(self, config: Config, grid: CountingGrid) -> None:
        super().__init__(config, say=lambda line: None)
        self._grid, self._up, self._down = grid, 0, 0
        self.found: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Record it."""
        super().__call__(event)
        if isinstance(event, RoundTrained):
            grid, clients = self._grid, self.config.federation.min_clients
            self.found = {
                "flower_up": (grid.up["train"] - self._up) / clients,
                "flower_down": (grid.down["train"] - self._down) / clients,
                "averaging": time.monotonic() - grid.answered,
            }
            self._up, self._down = grid.up["train"], grid.down["train"]


def _counted(messages: Iterable[Message], into: dict[str, int]) -> Iterator[Message]:
    for message in messages:
        kind = message.metadata.message_type.partition(".")[0]
        into[kind] = into.get(kind, 0) + recorddict_to_proto(message.content).ByteSize()
        yield message
