"""The lines that a run prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flower_app.runs.folders import FINISHED
from flower_app.runs.journal import as_record
from flower_app.runs.lines import finished_line, round_line, step_line
from flower_app.runs.sinks.registry import Run
from strategies.events import Event, StepDone


class Sink:
    """Says where the run goes, some of its steps, all of its rounds, and how it ended."""

    def __init__(self, run: Run) -> None:
        self._run, self._say = run, run.say
        self._every, self._rounds = run.config.output.log_every, run.config.train.rounds

    def start(self) -> None:
        """Say where the run goes."""
        self._say(f"run folder: {self._run.folder}")
        if self._run.after is not None:
            self._say(f"going on after round {self._run.after} of {self._rounds}")

    def event(self, event: Event) -> None:
        """Say a round, or a step if it is its turn."""
        if not isinstance(event, StepDone):
            self._say(round_line(as_record(event), self._rounds))
        elif event.step % self._every == 0 or event.step == event.steps:
            self._say(step_line(as_record(event), self._rounds))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Say how it ended."""
        done = summary["status"] == FINISHED
        self._say(finished_line(summary) if done else f"failed: {summary['error']}")
        self._say(f"run folder: {self._run.folder}")
