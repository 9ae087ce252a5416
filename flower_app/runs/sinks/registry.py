"""What a sink is, and how those that `tracking.sinks` names are found and kept from doing harm.

A sink is a module of this folder with a class `Sink`. Its three calls come one at a time, `event`
from several threads: whatever takes long there, the client whose step it is waits for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from conf import registry
from conf.schema import Config
from strategies.events import Event

logger = logging.getLogger(__name__)

ALWAYS = ("journal", "console")
"""Told without being named."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a sink is made for."""

    folder: Path
    config: Config
    say: Callable[[str], None]
    """Takes one line for the console."""
    after: int | None = None
    """The round after which a run that was stopped goes on; None: it is new."""


class Sink(Protocol):
    """Made with its `Run`, before anything of the run exists."""

    def start(self) -> None:
        """The run begins, or goes on."""

    def event(self, event: Event) -> None:
        """Something happened in it."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """It ended as `summary.json` says; `status` is finished, stopped or failed (`error`)."""


def names() -> list[str]:
    """Return the sinks there are."""
    return registry.names(__package__)


def make(name: str, run: Run) -> Sink:
    """Make the sink of a name that `names` knows."""
    made: Sink = registry.load(__package__, name).Sink(run)
    return made


class Guarded:
    """A sink that may fail: it is said once, and from then on the sink is told nothing more."""

    def __init__(self, name: str, run: Run) -> None:
        self._name, self._run = name, run
        self._sink: Sink | None = None

    def start(self) -> None:
        """Make the sink and start it."""

        def start() -> None:
            self._sink = make(self._name, self._run)
            self._sink.start()

        self._try(start)

    def event(self, event: Event) -> None:
        """Pass it on."""
        if (sink := self._sink) is not None:
            self._try(lambda: sink.event(event))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Pass it on."""
        if (sink := self._sink) is not None:
            self._try(lambda: sink.finish(summary))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 (whatever a tracker's library may raise)
            self._sink = None
            logger.warning(
                "the sink %s of tracking.sinks failed and is told nothing more: %s: %s. The run "
                "goes on, and all of it is in %s",
                self._name,
                type(error).__name__,
                error,
                self._run.folder,
            )
