"""What a run leaves: one folder with its configuration, metrics, summary, plot and model.

Lines are printed, not logged: Flower forwards what a ServerApp prints to `flwr run --stream`, while
its root logger drops everything below a warning.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.load import to_yaml
from conf.schema import Config
from flower_app.runs import checkpoint
from flower_app.runs.epsilon import epsilon_so_far
from flower_app.runs.folders import (
    FAILED,
    FINISHED,
    MODEL,
    STOPPED,
    SUMMARY,
    RunLock,
    folders,
    new_folder,
    runs_folder,
)
from flower_app.runs.history import read_history
from flower_app.runs.instants import instant, now
from flower_app.runs.journal import as_record, cut_back, dumps, replace_whole, require_round
from flower_app.runs.lines import adapted_line
from flower_app.runs.plots import plot_loss
from flower_app.runs.resume import Point
from flower_app.runs.sinks import console, journal
from flower_app.runs.sinks.registry import ALWAYS, Guarded, Run, Sink
from flower_app.runs.summary import summarize
from strategies.events import Event, RoundDone, Stopped

logger = logging.getLogger(__name__)


class Recorder:
    """Writes a run folder while the run goes on, and passes every event to the run's sinks.

    Events may come from several threads.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    folder : Path, optional
        The run folder; by default a new one under `output.folder`.
    say : callable, optional
        Takes one line for the console.
    point : Point, optional
        Where a run goes on: in its own folder, with its records up to there. The folder stays as
        it is until `take_up`.
    """

    def __init__(
        self,
        config: Config,
        folder: Path | None = None,
        say: Callable[[str], None] | None = None,
        point: Point | None = None,
    ) -> None:
        self.config, self.say = config, say or _print
        if point is not None:
            folder = point.run
        self.folder = (
            folder or new_folder(runs_folder(config.output.folder), config.experiment)
        ).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._alone = point.lock if point is not None and point.lock else RunLock(self.folder)
        self._lock = threading.Lock()
        self._rounds: list[dict[str, Any]] = []
        self._resumed: list[int] = []
        self._adapted: dict[str, float] = {}
        self._notes: dict[str, Any] = {}
        self._stopped = False
        self._point = point
        self.started, self._before = (point.started, point.seconds) if point else (now(), 0.0)
        self._clock = time.monotonic()
        after = point.number if point else None
        run = Run(folder=self.folder, config=config, say=self.say, after=after)
        self._journal, self._console = journal.Sink(run), console.Sink(run)
        named = dict.fromkeys(config.tracking.sinks)
        self._trackers = [Guarded(name, run) for name in named if name not in ALWAYS]
        self._sinks: list[Sink] = [self._journal, self._console, *self._trackers]
        if point is None:
            self._open()

    def start(self) -> None:
        """Print where the run goes, and begin to track it; a resumed one when it is taken up."""
        self._clock = time.monotonic()
        self._console.start()
        if self._point is None:
            self._track()

    def take_up(self) -> None:
        """Bring a resumed run's folder back to where it goes on; nothing for a new run.

        What was there after that point is lost then, so call it when nothing can fail any more that
        could have been tried before.
        """
        if self._point is None:
            return
        self._cut_back(self._point)
        self._resumed.append(self._point.number)
        self._point = None
        self._open()
        self._track()

    def built(self, model: str, shares: Mapping[str, float]) -> None:
        """Record what the trunk was cut from, and say which share of each part has an adapter.

        Parameters
        ----------
        model : str
            In words.
        shares : mapping
            By part, in [0, 1]; empty: nothing is adapted. The summary tells it too.
        """
        if self._point is None:  # a resumed run has said it
            self._journal.model(model)
        self._adapted = dict(shares)
        if shares:
            self.say(adapted_line(shares))

    def note(self, **facts: Any) -> None:
        """Have the summary say this too."""
        self._notes |= facts

    def __call__(self, event: Event) -> None:
        """Record what the strategy tells."""
        with self._lock:
            if isinstance(event, RoundDone):
                event = replace(event, epsilon=epsilon_so_far(self.config, event.round))
                self._rounds.append(as_record(event))
            if isinstance(event, Stopped):
                self._stopped = not event.why
                self._notes |= {"stopped_early": event.why} if event.why else {}
            for sink in self._sinks:
                sink.event(event)

    def sync(self) -> None:
        """Have all records on the disk, or raise OSError."""
        with self._lock:
            self._journal.sync()

    @property
    def seconds(self) -> float:
        """What the run has taken so far, that of a resumed one before it was stopped too."""
        return self._before + time.monotonic() - self._clock

    def finish(self, model_folder: str | Path | None = None) -> dict[str, Any]:
        """Write the summary and the plot, and print where everything is; returns the summary.

        Parameters
        ----------
        model_folder : path, optional
            Where the final model was saved.

        Raises
        ------
        RuntimeError
            If the records of the complete run cannot be written.
        """
        summary = self._summary(STOPPED if self._stopped else FINISHED)
        summary[MODEL] = None if model_folder is None else self._place(Path(model_folder).resolve())
        try:
            self._close(summary)
        except OSError as error:
            raise RuntimeError(
                f"the run is complete, but its records cannot be written to {self.folder}: "
                f"{error.strerror or error}; free space and resume it "
                f"(`graft resume {self.folder}`), which repeats only what is missing"
            ) from error
        self._tell_end(summary)
        return summary

    def fail(self, error: BaseException | str) -> dict[str, Any]:
        """Write a summary that says why the run ended early; returns it.

        A resumed run that was not taken up leaves its folder as it was.
        """
        summary = self._summary(FAILED)
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        summary["error"] = text
        if self._point is not None:
            self._alone.release()
            self.say(f"failed: {text}")
            self.say(f"not resumed, and nothing was changed in {self.folder}")
            return summary
        try:
            self._close(summary)
        except OSError as problem:  # what ended the run is what must be told
            logger.warning("%s cannot be written: %s", self.folder, problem.strerror or problem)
        self._tell_end(summary)
        return summary

    def _open(self) -> None:
        replace_whole(self.folder / "config.yaml", to_yaml(self.config))
        self._journal.start()

    def _track(self) -> None:
        for sink in self._trackers:
            sink.start()

    def _cut_back(self, point: Point) -> None:
        path = self.folder / "metrics.jsonl"
        require_round(path, point.number, kind="trained" if point.unevaluated else "round")
        stay = cut_back(path, point.number, unevaluated=point.unevaluated)
        kinds = [(record.get("kind"), record) for record in stay]
        self._rounds = [record for kind, record in kinds if kind == "round"]
        self._resumed = [record["round"] for kind, record in kinds if kind == "resume"]
        (self.folder / SUMMARY).unlink(missing_ok=True)
        checkpoint.clean(self.folder)
        for number, path in folders(self.folder):
            if number > point.number:
                checkpoint.remove(path)

    def _place(self, path: Path) -> str:
        """Relative to the folder where that can be, so that it moves along."""
        inside = path.is_relative_to(self.folder)
        return str(path.relative_to(self.folder) if inside else path)

    def _summary(self, status: str) -> dict[str, Any]:
        return {
            "status": status,
            **summarize(self.config, self._rounds, self.seconds, cut_off=status == FAILED),
            "started": instant(self.started).isoformat(),
            "finished": now(),
            **self._notes,
            **({"adapted": self._adapted} if self._adapted else {}),
            **({"resumed": self._resumed} if self._resumed else {}),
        }

    def _close(self, summary: dict[str, Any]) -> None:
        try:
            with self._lock:
                self._journal.finish(summary)
            replace_whole(self.folder / SUMMARY, dumps(summary, indent=2) + "\n")
            self._draw()
        finally:
            self._alone.release()

    def _draw(self) -> None:
        history = read_history(self.folder)
        if not history.steps and not history.rounds:
            return
        try:
            plot_loss(history)
        except OSError as error:
            logger.warning(
                "loss.png cannot be written: %s; `graft plot %s` draws it again",
                error.strerror or error,
                self.folder.name,
            )

    def _tell_end(self, summary: dict[str, Any]) -> None:
        for sink in self._sinks[1:]:  # the journal is closed before the summary is written
            sink.finish(summary)


def _print(line: str) -> None:
    print(line, flush=True)
