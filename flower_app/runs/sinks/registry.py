"""What a sink is, and how those that `tracking.sinks` names are found and kept from doing harm.

A sink is a module of this folder with a class `Sink`. Its three calls come one at a time. Those of
a tracker come from a thread of its own, so that no client's step waits for it, and the run's end
`FLUSH` seconds at most. A module that says `NEEDS = "library"` is refused before a run starts where
that cannot be imported; the extra that brings it has the sink's name.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from conf import registry
from conf.rules import ConfigError
from conf.schema import Config
from strategies.events import Event, StepDone

logger = logging.getLogger(__name__)

ALWAYS = ("journal", "console")
"""Told without being named."""
WAITING = 10_000
"""Steps that may wait for a slow tracker; later ones are left out, rounds never."""
BEGIN, FLUSH = 10.0, 30.0
"""Seconds that a run waits for a tracker: to begin, and to take in the rest at the end."""


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


def check_installed(name: str) -> None:
    """Refuse a sink whose library is not installed; `ConfigError` with the remedy."""
    for place in find_spec(__package__).submodule_search_locations or ():  # type: ignore[union-attr]
        file = Path(place) / f"{name.replace('-', '_')}.py"
        needed = _NEEDS.search(file.read_text("utf-8")) if file.exists() else None
        if needed and find_spec(needed[1]) is None:
            raise ConfigError(
                f"tracking.sinks names {name}, whose library {needed[1]} is not installed: "
                f"pip install 'graft[{name}]', or leave {name} out",
                key="tracking.sinks",
            )


_NEEDS = re.compile(r'^NEEDS = "(\w+)"$', re.MULTILINE)


class Guarded:
    """A tracker with a thread of its own, which may fail, hang or be slow: the run goes on.

    A failure is said once, and from then on the sink is told nothing more.
    """

    def __init__(self, name: str, run: Run) -> None:
        self._name, self._run = name, run
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"graft-{name}", daemon=True)
        self._sink: Sink | None = None
        self._begun, self._failed, self._left_out = threading.Event(), False, 0

    def start(self) -> None:
        """Make the sink and start it. It has some time for its imports before the run's begin."""
        self._thread.start()
        self._calls.put(self._start)
        self._begun.wait(BEGIN)

    def event(self, event: Event) -> None:
        """Pass it on, unless it is a step and too many wait."""
        if self._failed:
            return
        if isinstance(event, StepDone) and self._calls.qsize() >= WAITING:
            self._left_out += 1
            return
        self._calls.put(lambda: self._made.event(event))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Pass it on, and wait until it is done, `FLUSH` seconds at most."""
        if not self._thread.is_alive():
            return
        self._calls.put(lambda: self._made.finish(summary))
        self._calls.put(None)
        self._thread.join(FLUSH)
        if self._thread.is_alive():
            self._failed = True
            self._warn(f"did not take in the rest within {FLUSH:g} s and is left behind")
        if self._left_out:
            self._warn(f"was too slow: {self._left_out} steps were left out")

    def _work(self) -> None:
        while not self._failed and (call := self._calls.get()) is not None:
            try:
                call()
            except (Exception, SystemExit) as error:  # noqa: BLE001 (a library may raise whatever)
                if not self._failed:
                    self._failed = True
                    why = f"{type(error).__name__}: {error}"
                    self._warn(f"failed and is told nothing more: {why}")
            self._begun.set()

    def _start(self) -> None:
        self._sink = make(self._name, self._run)
        self._sink.start()

    @property
    def _made(self) -> Sink:
        assert self._sink is not None, "an event before the start"
        return self._sink

    def _warn(self, what: str) -> None:
        logger.warning(
            "the sink %s of tracking.sinks %s. The run goes on, and all of it is in %s",
            self._name,
            what,
            self._run.folder,
        )
