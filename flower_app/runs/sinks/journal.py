"""Every event as a line of `metrics.jsonl`: what a resumed run goes by, so its failure counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flower_app.runs.environment import describe_environment
from flower_app.runs.instants import now
from flower_app.runs.journal import Journal, as_record, dumps
from flower_app.runs.sinks.registry import Run
from strategies.events import Event


class Sink:
    """Keeps what a full disk does not take; OSError from `sync` and `finish` if it never does."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._journal: Journal | None = None

    def start(self) -> None:
        """Open the file, and say where the run begins, or where a stopped one goes on."""
        self._journal = Journal(self._run.folder / "metrics.jsonl", self._run.say)
        after = self._run.after
        kind = "start" if after is None else "resume"
        self._write({"kind": kind, "round": after or 0, "environment": describe_environment()})

    def model(self, description: str) -> None:
        """Say what the trunk was cut from."""
        self._write({"kind": "model", "round": 0, "model": description})

    def event(self, event: Event) -> None:
        """Write its line."""
        self._write(as_record(event))

    def sync(self) -> None:
        """Have all lines on the disk."""
        if self._journal is not None:
            self._journal.sync()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write what is still owed, and close the file."""
        if self._journal is not None:
            self._journal.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._journal is not None, "an event before the start"
        self._journal.write(dumps({**record, "time": now()}))
