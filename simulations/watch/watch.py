"""Finds a run and shows it until it ends."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.live import Live

from flower_app.runs.folders import (
    find_run,
    in_order,
    read_summaries,
    read_summary,
    runs_folder,
    unfinished_runs,
)
from flower_app.runs.history import METRICS, RUNNING, UNFINISHED, Follower, History
from simulations.watch.frame import Frame
from simulations.watch.state import State, state_of
from simulations.watch.writer import memory_mb, writer_of

SPARE = 10.0
"""At least so many times as long as a look takes is the time until the next: runs may be long."""


def watch(run: str, *, once: bool, interval: float, console: Console | None = None) -> None:
    """Show a run until it ends, from its folder alone.

    Parameters
    ----------
    run : str
        A run folder or its name; empty: the newest that is going, else the newest.
    once : bool
        Show it once; so does a console that is no terminal.
    interval : float
        Seconds between two looks.
    console : Console, optional
        Where to.

    Raises
    ------
    ValueError
        If there is no such run.
    """
    console = console or Console()
    folder = find_run(run) if run else newest_run()
    if not (folder / METRICS).exists() and read_summary(folder) is None:
        raise ValueError(f"{folder} is no run folder: it has no {METRICS} and no summary.json")
    follower, took = Follower(folder), 0.0
    state = look(follower.poll())
    if once or not console.is_terminal or state.history.status != RUNNING:
        console.print(Frame(state, whole=not console.is_terminal))
        return
    try:
        with Live(Frame(state), console=console, auto_refresh=False) as live:
            while state.history.status in (RUNNING, UNFINISHED):
                live.update(Frame(state), refresh=True)
                time.sleep(max(interval, took * SPARE))
                began = time.monotonic()
                state = look(follower.poll())
                took = time.monotonic() - began
            live.update(Frame(state), refresh=True)
    except KeyboardInterrupt:
        told = f"the run goes on without being watched; graft watch {folder.name} looks again"
        console.print(told, highlight=False, markup=False)


def newest_run(folder: str | Path = "") -> Path:
    """Return the newest run that is going, else the newest; ValueError if there is none."""
    begun = unfinished_runs(folder)
    for path in reversed(begun):
        if Follower(path).poll().status == RUNNING:
            return path
    if not (runs := in_order([*begun, *(path for path, _ in read_summaries(folder))])):
        raise ValueError(
            f"there is no run under {runs_folder(folder)}; `graft demo` makes one, and a folder "
            "elsewhere is given by its path"
        )
    return runs[-1]


def look(history: History) -> State:
    """The run now; the memory of its process, if that is on this machine."""
    going = history.status == RUNNING
    return state_of(
        history, datetime.now(UTC), memory_mb(writer_of(history.folder)) if going else None
    )
