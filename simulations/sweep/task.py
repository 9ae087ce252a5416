"""A point that is being run: what its thread has learned, and the wish that it ends."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from simulations.launch.console import without_actor
from simulations.sweep.state import Point

_ROUND = re.compile(r"round (\d+)/\d+ \|(?:.*held-out loss ([\d.]+))?")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a point's run came to its end."""

    status: str
    """Of `state`: finished, crashed or stopped."""
    error: str = ""


class Task:
    """What passes between a point's thread and the sweep.

    Parameters
    ----------
    point : Point
        As it stood when it was started; it is the sweep's to change.
    log : Path
        Takes every line of the run, below those of earlier tries.
    """

    def __init__(self, point: Point, log: Path) -> None:
        self.point, self.log = point, log
        self.run, self.run_id, self.mark, self.failure = point.run, "", "", ""
        self.rounds = 0
        """Trained and over, as its lines say."""
        self.loss = ""
        """The last held-out loss that it printed."""
        self.halted = threading.Event()
        self.stop: Callable[[], None] | None = None
        """How the run is asked to end, where ending `flwr run` does not."""
        self._process: subprocess.Popen[str] | None = None

    def say(self, line: str) -> None:
        """Take a line of the run."""
        text = without_actor(line)
        if text.startswith("run folder: "):
            self.run = text.removeprefix("run folder: ")
        elif text.startswith("failed: "):
            self.failure = text.removeprefix("failed: ")
        elif found := re.search(r"Successfully started run (\d+)", line):
            self.run_id = found.group(1)
        elif found := _ROUND.match(text):
            self.rounds, self.loss = int(found.group(1)), found.group(2) or self.loss
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def waiting(self, process: subprocess.Popen[str]) -> None:
        """Take the process that waits for the run's end."""
        self._process = process
        if self.halted.is_set():
            process.terminate()

    def halt(self) -> None:
        """Wish that the run ends; its thread returns soon."""
        self.halted.set()
        if self.stop is not None:
            with suppress(RuntimeError):  # it may have ended just now
                self.stop()
        if self._process is not None:
            self._process.terminate()


class Runner(Protocol):
    """Runs a point in a thread of its own until the run has ended, or the task is halted."""

    def __call__(self, task: Task) -> Ended:
        """Run it; whatever goes wrong with the run is told, not raised."""
