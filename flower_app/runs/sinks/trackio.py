"""Trackio: local and free, with W&B's interface; `trackio show` opens its page.

TRACKIO_DIR says where it keeps its runs, TRACKIO_SPACE_ID names a Space to send them to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flower_app.runs.journal import as_record
from flower_app.runs.sinks._identity import project
from flower_app.runs.sinks._scalars import hyperparameters, scalars
from flower_app.runs.sinks.registry import Run
from strategies.events import Event

NEEDS = "trackio"


class Sink:
    """Logs scalars; a resumed run goes on under its name."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def start(self) -> None:
        """Begin the run, or go on with the one of its name."""
        import trackio

        self._tracked = trackio.init(
            project=project(self._run),
            name=self._run.folder.name,
            config={**hyperparameters(self._run.config), "run_folder": str(self._run.folder)},
            resume="never" if self._run.after is None else "allow",
            embed=False,
        )

    def event(self, event: Event) -> None:
        """Log its numbers, at their step or round."""
        if told := scalars(as_record(event)):
            self._tracked.log(told.values, step=told.step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the summary's numbers, and wait until all is written."""
        numbers = {
            f"summary/{name}": told
            for name, told in summary.items()
            if isinstance(told, int | float) and not isinstance(told, bool)
        }
        self._tracked.log(numbers)
        self._tracked.finish()
