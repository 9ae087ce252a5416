"""How a sweep goes, on the console: a bar with the time left, or a line for each point."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from simulations.sweep.state import FINISHED, Point, Sweep
from simulations.sweep.task import Task


class Lines:
    """A line for each point that begins or ends.

    Parameters
    ----------
    sweep : Sweep
        What is shown.
    total : int
        How many points there will be.
    say : callable
        Takes a line.
    clock : callable
        Seconds.
    """

    def __init__(
        self,
        sweep: Sweep,
        total: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sweep, self._total, self._say, self._clock = sweep, total, say, clock
        self._since: dict[str, float] = {}
        self._at_once = 1

    def started(self, task: Task) -> None:
        """A point begins, or goes on."""
        point = task.point
        self._since[point.id] = self._clock()
        how = "goes on" if point.run else "started"
        self._say(f"[{self._done()}/{self._total}] {point.id} {how}: {point.name}")

    def ended(self, point: Point) -> None:
        """A point has ended."""
        self._say(f"[{self._done()}/{self._total}] {outcome(point)}{self._left_words()}")
        self._since.pop(point.id, None)

    def tick(self, running: list[Task]) -> None:
        """Some time has passed."""
        self._at_once = max(1, len(running))

    def left(self) -> float | None:
        """Seconds that are left, by the points that are finished; None if none is."""
        took = [each.seconds for each in self._sweep.points if each.status == FINISHED]
        if not took:
            return None
        mean, now = sum(took) / len(took), self._clock()
        open_ = self._total - self._done()
        gone = sum(min(mean, now - since) for since in self._since.values())
        return max(0.0, mean * open_ - gone) / self._at_once

    def _done(self) -> int:
        return sum(not point.open for point in self._sweep.points)

    def _left_words(self) -> str:
        left = self.left()
        return "" if left is None or self._done() == self._total else f"; about {span(left)} left"


class Bar(Lines):
    """A bar for the sweep and a line for each point that is running, drawn anew as they change.

    Parameters
    ----------
    sweep, total
        As in `Lines`.
    console : Console
        A terminal.
    """

    def __init__(self, sweep: Sweep, total: int, console: Console) -> None:
        # As they stand: [a,b] is no markup.
        super().__init__(
            sweep, total, lambda line: console.print(line, markup=False, highlight=False)
        )
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}")
        )
        self._bar = self._progress.add_task(sweep.name, total=total, words="")
        self._live = Live(self._progress, console=console, refresh_per_second=4)

    def __enter__(self) -> Bar:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._live.stop()

    def started(self, task: Task) -> None:
        """A point begins: it gets a line below the bar."""
        self._since[task.point.id] = self._clock()

    def tick(self, running: list[Task]) -> None:
        """Draw anew."""
        super().tick(running)
        left = self.left()
        words = f"{self._done()}/{self._total} points"
        words += "" if left is None else f", about {span(left)} left"
        self._progress.update(self._bar, completed=self._done(), words=words)
        table = Table.grid(padding=(0, 2))
        table.add_row(self._progress)
        for task in running:
            table.add_row(Text(self._line(task), overflow="ellipsis", no_wrap=True))
        self._live.update(table)

    def _line(self, task: Task) -> str:
        point = task.point
        loss = f", held-out loss {task.loss}" if task.loss else ""
        went = span(self._clock() - self._since[point.id])
        return f"  {point.id} {point.name}: round {task.rounds}/{point.rounds}{loss}, {went}"


def outcome(point: Point) -> str:
    """Return how a point ended, in a line."""
    why = f": {point.error}" if point.error else ""
    memory = f", {point.peak_mb:,.0f} MB" if point.peak_mb else ""
    return f"{point.id} {point.status} in {span(point.seconds)}{memory}: {point.name}{why}"


def span(seconds: float) -> str:
    """Return a span of time in words."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole / 60:.0f} min"
    return f"{whole / 3600:.1f} h"
