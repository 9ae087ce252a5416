"""`graft sweep`: begins a sweep or goes on with one, and leaves its table and plots."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from simulations.sweep.execute import Display, Execution, Listed, Source
from simulations.sweep.limits import Limits, cores_needed, federation_of, find_limits
from simulations.sweep.plan import config_of, make_folder, plan, same_but_open
from simulations.sweep.progress import Bar, Lines
from simulations.sweep.runner import Deployed, Simulated
from simulations.sweep.spec import Spec
from simulations.sweep.state import (
    CRASHED,
    FINISHED,
    PENDING,
    Point,
    Sweep,
    find_sweep,
    lock_sweep,
    read_sweep,
    sweeps_folder,
    write_sweep,
)
from simulations.sweep.task import Runner, Task

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a sweep may take; 0 stands for what there is."""

    jobs: int = 0
    cores: int = 0
    memory_gb: float = 0.0


def begin(spec: Spec, room: Room, superlink: str = "", *, say: Say = print) -> Sweep:
    """Begin a sweep, and run it to its end.

    Parameters
    ----------
    spec : Spec
        What was asked for; each point is checked before any starts.
    room : Room
        What it may take.
    superlink : str
        A connection of the user's Flower configuration; empty: simulated here.
    say : callable
        Takes a line for the console.
    """
    sweep = plan(spec, superlink, say)
    if other := same_but_open(sweep, sweeps_folder()):
        say(f"(a sweep of the same points is unfinished: graft sweep --resume {other.name})")
    folder = make_folder(sweep)
    say(f"sweep folder: {folder}")
    return _run(folder, sweep, room, say)


def go_on(name: str, room: Room, *, retry: bool = False, say: Say = print) -> Sweep:
    """Go on with a sweep that was stopped or killed.

    Parameters
    ----------
    name : str
        Its folder, or the folder's name.
    room : Room
        What it may take.
    retry : bool
        Run crashed points again.
    say : callable
        Takes a line for the console.
    """
    folder = find_sweep(name)
    sweep = read_sweep(folder)
    for point in sweep.points:
        if retry and point.status == CRASHED:
            point.status = PENDING
    left = sum(point.open for point in sweep.points)
    say(f"sweep folder: {folder}; {sweep.count(FINISHED)} points are finished, {left} are left")
    return _run(folder, sweep, room, say)


def _run(folder: Path, sweep: Sweep, room: Room, say: Say) -> Sweep:
    lock = lock_sweep(folder)
    try:
        write_sweep(folder, sweep)
        limits, runner, need = _places(folder, sweep, room, say)
        with _display(sweep, len(sweep.points), say) as display:
            Execution(
                folder=folder,
                sweep=sweep,
                runner=runner,
                source=_source(folder, sweep),
                limits=limits,
                display=display,
                need=need,
            ).run()
    except (KeyboardInterrupt, SystemExit):
        done = sweep.count(FINISHED)
        say(f"stopped with {done} of {len(sweep.points)} points finished; to go on:")
        say(f"  graft sweep --resume {folder}")
        raise
    finally:
        lock.release()
    return sweep


def _source(folder: Path, sweep: Sweep) -> Source:
    return Listed(sweep.points)


def _places(
    folder: Path, sweep: Sweep, room: Room, say: Say
) -> tuple[Limits, Runner, Callable[[Point], int]]:
    """Limits, what runs a point, and how many cores one takes."""
    if sweep.superlink:
        jobs = room.jobs or 1
        say(f"points run on the SuperLink '{sweep.superlink}', {jobs} at a time")
        limits = find_limits(jobs)
        return limits, Deployed(sweep.experiment, sweep.superlink, folder), lambda point: 1
    limits = find_limits(room.jobs, room.cores, room.memory_gb)
    if not limits.jobs and any(_on_gpu(sweep, point) for point in sweep.points):
        say("points compute on a GPU, whose memory is not shared out: one at a time (or --jobs N)")
        limits = find_limits(1, room.cores, room.memory_gb)
    at_once = limits.jobs or max(1, sum(point.open for point in sweep.points))
    share = max(1, limits.cores // at_once)

    def need(point: Point) -> int:
        return max(share, cores_needed(config_of(sweep, point), point.clients, limits.cores))

    def federation(task: Task) -> str:
        point = task.point
        return federation_of(config_of(sweep, point), point.clients, need(point))

    how = f"{limits.jobs} at a time" if limits.jobs else "as many at a time as fit"
    say(f"{how}: {limits.cores} cores, {limits.memory_mb / 1024:.1f} GB")
    return limits, Simulated(sweep.experiment, federation), need


def _on_gpu(sweep: Sweep, point: Point) -> bool:
    runtime = config_of(sweep, point).runtime
    return {runtime.client_device, runtime.trunk_device} != {"cpu"}


def _display(sweep: Sweep, total: int, say: Say) -> AbstractContextManager[Display]:
    if sys.stderr.isatty():
        return Bar(sweep, total, Console(stderr=True))
    return nullcontext(Lines(sweep, total, say))
