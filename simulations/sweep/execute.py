"""Runs a sweep's points, several at a time, and keeps their state on the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from simulations.launch.processes import stopping
from simulations.sweep.limits import Limits, measure
from simulations.sweep.runner import guarded
from simulations.sweep.state import (
    CRASHED,
    PRUNED,
    RUNNING,
    STOPPED,
    Point,
    Sweep,
    write_sweep,
)
from simulations.sweep.task import Ended, Runner, Task

POLL_SECONDS = 0.3
MEASURE_SECONDS = 2.0
"""Between two looks at how much memory the points' processes have."""
HALT_SECONDS = 60.0
"""How long points that are asked to end may take; what is left then ends with this process."""


class Source(Protocol):
    """Where points come from."""

    def next(self) -> Point | None:
        """The next one to run; None if there is none, or none yet."""

    def hopeless(self, task: Task) -> bool:
        """Whether a run that goes on need not be finished."""

    def ended(self, point: Point) -> None:
        """Learn how a point ended."""


class Listed:
    """Points that were all there from the beginning, in order."""

    def __init__(self, points: list[Point]) -> None:
        self._left = [point for point in points if point.open]

    def next(self) -> Point | None:
        """The first that is left."""
        return self._left.pop(0) if self._left else None

    def hopeless(self, task: Task) -> bool:
        """Never: a table has no holes."""
        return False

    def ended(self, point: Point) -> None:
        """Nothing follows from it."""


class Display(Protocol):
    """Shows how a sweep goes."""

    def started(self, task: Task) -> None:
        """A point begins, or goes on."""

    def ended(self, point: Point) -> None:
        """A point has ended."""

    def tick(self, running: list[Task]) -> None:
        """Some time has passed."""


@dataclass(kw_only=True)
class Execution:
    """One try at a sweep: from where it stands to its end, or until it is stopped.

    Each point runs in a thread; this one alone changes and writes the state.
    """

    folder: Path
    sweep: Sweep
    runner: Runner
    source: Source
    limits: Limits
    display: Display
    need: Callable[[Point], int] = lambda point: 1
    """Cores that a point takes."""
    clock: Callable[[], float] = time.monotonic
    _running: dict[str, tuple[Task, threading.Thread, list[Ended]]] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)
    _pruned: set[str] = field(default_factory=set)
    _waiting: Point | None = None
    _measured: float = 0.0

    def run(self) -> None:
        """Run all points there are. Signals that end the program stop those that are running."""
        with stopping():
            try:
                self._loop()
            finally:
                self._halt()

    def _loop(self) -> None:
        while True:
            self._start_more()
            if not self._running:
                return
            time.sleep(POLL_SECONDS)
            self._look()
            self.display.tick(self._tasks())

    def _tasks(self) -> list[Task]:
        return [task for task, _, _ in self._running.values()]

    def _start_more(self) -> None:
        while True:
            point = self._waiting = self._waiting or self.source.next()
            if point is None or not self._admitted(point):
                return
            self._waiting = None
            self._start(point)

    def _admitted(self, point: Point) -> bool:
        """Whether one more may start: not before one has shown, for a round, what it takes."""
        tasks = self._tasks()
        need = {each.id: self.need(each) for each in (point, *(task.point for task in tasks))}
        known = [each.peak_mb for each in self.sweep.points if not each.open]
        known += [task.point.peak_mb for task in tasks if task.rounds]
        peak = max(known, default=0.0)
        if peak:  # others may be on their way past it
            peak = max(peak, *(task.point.peak_mb for task in tasks), 0.0)
        return self.limits.admit(tasks, need, point.id, peak)

    def _start(self, point: Point) -> None:
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        task, ended = Task(point, logs / f"{point.id}.log"), list[Ended]()
        thread = threading.Thread(
            target=lambda: ended.append(guarded(self.runner, task)), name=point.id, daemon=True
        )
        self._running[point.id] = (task, thread, ended)
        self._since[point.id] = self.clock()
        point.status, point.error = RUNNING, ""
        self._write()
        self.display.started(task)
        thread.start()

    def _look(self) -> None:
        """See what has become of the points that are running."""
        now = self.clock()
        if now - self._measured >= MEASURE_SECONDS:
            self._measured = now
            for task in self._tasks():
                task.point.peak_mb = max(task.point.peak_mb, round(measure(task), 1))
        changed = False
        for task, thread, ended in list(self._running.values()):
            if not thread.is_alive():
                self._end(task, ended[0] if ended else Ended(status=CRASHED, error="its thread"))
                continue
            changed = self._learn(task) or changed
            if task.point.id not in self._pruned and self.source.hopeless(task):
                self._pruned.add(task.point.id)
                threading.Thread(target=task.halt, daemon=True).start()
        if changed:
            self._write()

    def _learn(self, task: Task) -> bool:
        point = task.point
        news = (task.run or point.run, task.run_id or point.run_id)
        changed = news != (point.run, point.run_id)
        point.run, point.run_id = news
        return changed

    def _end(self, task: Task, ended: Ended) -> None:
        point = task.point
        self._learn(task)
        del self._running[point.id]
        point.seconds = round(point.seconds + self.clock() - self._since[point.id], 1)
        point.status, point.error = ended.status, ended.error
        if ended.status == STOPPED and point.id in self._pruned:
            point.status = PRUNED
        self._write()
        self.source.ended(point)
        self.display.ended(point)

    def _halt(self) -> None:
        """Stop what is running, wait for it, and leave a state from which the sweep goes on."""
        threads = [threading.Thread(target=task.halt, daemon=True) for task in self._tasks()]
        for thread in threads:
            thread.start()
        end = self.clock() + HALT_SECONDS
        for task, thread, ended in list(self._running.values()):
            thread.join(max(0.0, end - self.clock()))
            self._end(task, ended[0] if ended else Ended(status=STOPPED))

    def _write(self) -> None:
        write_sweep(self.folder, self.sweep)
