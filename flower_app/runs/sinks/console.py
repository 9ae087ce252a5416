"""Prints a run's lines as events come; `lines` words them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flower_app.runs.folders import FAILED
from flower_app.runs.journal import as_record
from flower_app.runs.lines import ended_line, round_line, step_line
from flower_app.runs.sinks.registry import Run
from strategies.events import Event, RoundDone, StepDone, Stopped


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
        if isinstance(event, RoundDone):
            self._say(round_line(as_record(event), self._rounds))
        elif isinstance(event, Stopped):
            why = event.why or "as it was asked to"
            self._say(f"stops after round {event.round} of {event.rounds}: {why}")
        elif not isinstance(event, StepDone):
            return
        elif event.step % self._every == 0 or event.step == event.steps:
            self._say(step_line(as_record(event), self._rounds))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Say how it ended."""
        failed = summary["status"] == FAILED
        self._say(f"failed: {summary['error']}" if failed else ended_line(summary))
        self._say(f"run folder: {self._run.folder}")
