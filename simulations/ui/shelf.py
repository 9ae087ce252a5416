"""The runs under GRAFT_HOME as they stand, read again only where something is new."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from flower_app.runs.folders import in_order, read_summaries, runs_folder, unfinished_runs
from flower_app.runs.history import Follower, History
from simulations.report.numbers import describe

Run = dict[str, Any]

MOST = 200
"""Runs that are listed; the newest."""


class Shelf:
    """The runs of a folder, as `simulations.report` describes each."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._followers: dict[Path, Follower] = {}
        self._known: dict[Path, tuple[tuple[Any, ...], Run]] = {}
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        """Where the runs are."""
        return self._folder or runs_folder()

    def names(self) -> list[str]:
        """Return the names of the runs, the newest first."""
        ended = [path for path, _ in read_summaries(self.folder)]
        runs = in_order({*ended, *unfinished_runs(self.folder)})
        return [run.name for run in reversed(runs[-MOST:])]

    def runs(self, names: list[str]) -> list[Run]:
        """Return what is known of runs by name; those that are gone are left out."""
        with self._lock:
            found = [self._run(self.folder / name) for name in names]
        return [run for run in found if run is not None]

    def _run(self, folder: Path) -> Run | None:
        if folder.parent != self.folder or not folder.is_dir():
            return None
        history = self._followers.setdefault(folder, Follower(folder)).poll()
        stamp = _stamp(history)
        known = self._known.get(folder)
        if known is None or known[0] != stamp:
            self._known[folder] = known = (stamp, describe(history))
        return known[1]


def _stamp(history: History) -> tuple[Any, ...]:
    """What changes when there is something new."""
    last = history.trained or {}
    return (
        id(history),
        len(history.steps),
        len(history.rounds),
        len(history.asked),
        len(history.answered),
        last.get("round"),
        history.status,
        history.summary is not None,
    )
