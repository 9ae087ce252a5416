"""`graft sweep`: begins a sweep or goes on with one, and leaves its table and plots."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from conf.load import load_config
from conf.schema import Config
from simulations.sweep.estimate import estimate
from simulations.sweep.execute import Display, Execution, Listed, Source
from simulations.sweep.limits import Limits, cores_needed, federation_of, find_limits
from simulations.sweep.plan import config_of, make_folder, plan, same_but_open
from simulations.sweep.progress import Bar, Lines, span
from simulations.sweep.runner import Deployed, Simulated
from simulations.sweep.search import Sampled, plan_search
from simulations.sweep.spec import Spec, shipped
from simulations.sweep.state import (
    CRASHED,
    FILE,
    FINISHED,
    OPEN,
    PENDING,
    Point,
    Sweep,
    counted,
    find_sweep,
    lock_sweep,
    read_sweep,
    sweeps_folder,
    write_sweep,
)
from simulations.sweep.tables import write_tables
from simulations.sweep.task import Runner, Task

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a sweep may take; 0 stands for what there is."""

    jobs: int = 0
    cores: int = 0
    memory_gb: float = 0.0


def begin(
    spec: Spec,
    room: Room,
    superlink: str = "",
    *,
    pruner: str = "median",
    say: Say = print,
    runner: Runner | None = None,
) -> Sweep:
    """Begin a sweep, and run it to its end.

    Parameters
    ----------
    spec : Spec
        What was asked for; each point is checked before any starts.
    room : Room
        What it may take.
    superlink : str
        A connection of the user's Flower configuration; empty: simulated here.
    pruner : str
        Of a search: what ends hopeless points early.
    say : callable
        Takes a line for the console.
    runner : Runner, optional
        Runs a point in place of Flower.
    """
    if spec.search:
        sweep = plan_search(spec, pruner, superlink, say)
    else:
        sweep, _ = plan(spec, superlink, say)
    if other := same_but_open(sweep, sweeps_folder()):
        say(f"(a sweep of the same points is unfinished: graft sweep --resume {other.name})")
    folder = make_folder(sweep)
    say(f"sweep folder: {folder}")
    return _run(folder, sweep, room, say, runner)


def go_on(
    name: str,
    room: Room,
    *,
    retry: bool = False,
    say: Say = print,
    runner: Runner | None = None,
) -> Sweep:
    """Go on with a sweep that was stopped or killed.

    Parameters
    ----------
    name : str
        Its folder, or the folder's name.
    room : Room
        What it may take.
    retry : bool
        Run crashed points again.
    say, runner
        As in `begin`.
    """
    folder = find_sweep(name)
    sweep = read_sweep(folder)
    for point in sweep.points:
        if retry and point.status == CRASHED:
            point.status = PENDING
    left = sum(point.open for point in sweep.points)
    say(f"sweep folder: {folder}; {counted(sweep.count(FINISHED), 'point')} finished, {left} left")
    return _run(folder, sweep, room, say, runner)


def _run(folder: Path, sweep: Sweep, room: Room, say: Say, runner: Runner | None) -> Sweep:
    lock = lock_sweep(folder)
    total = sweep.search.get("points", len(sweep.points))
    try:
        write_sweep(folder, sweep)
        limits, place, need = _places(folder, sweep, room, say)
        with _display(sweep, total, say) as display:
            Execution(
                folder=folder,
                sweep=sweep,
                runner=runner or place,
                source=_source(folder, sweep),
                limits=limits,
                display=display,
                need=need,
            ).run()
    except (KeyboardInterrupt, SystemExit):
        done = sweep.count(FINISHED)
        say(f"stopped with {done} of {counted(total, 'point')} finished; to go on:")
        say(f"  graft sweep --resume {folder}")
        raise
    finally:
        lock.release()
    _tell_end(folder, sweep, say)
    return sweep


def _tell_end(folder: Path, sweep: Sweep, say: Say) -> None:
    made = write_tables(folder, sweep)
    say((folder / "table.md").read_text(encoding="utf-8"))
    say(f"in {folder}: {', '.join(path.name for path in made)}")
    if crashed := sweep.count(CRASHED):
        say(f"{counted(crashed, 'point')} crashed; to run what crashed again:")
        say(f"  graft sweep --resume {folder} --retry-failed")
    if stopped := sweep.count(*OPEN):
        say(f"{counted(stopped, 'point')} stopped; to go on: graft sweep --resume {folder}")


def dry_run(spec: Spec, room: Room, superlink: str = "", *, say: Say = print) -> None:
    """Say what a sweep would run, and how long that would take; each point is checked."""
    if spec.search:
        raise ValueError("--dry-run lists points, and a search has none before it runs")
    sweep, configs = plan(spec, superlink, say)
    found, basis = estimate(sweep.points, configs)
    for point, each in zip(sweep.points, found, strict=True):
        clients = (
            f" clients={point.clients}" if point.clients and "clients" not in sweep.keys else ""
        )
        took = "" if each.seconds is None else f"  {span(each.seconds)}"
        sent = "" if each.mb is None else f", {each.mb:,.1f} MB"
        say(f"{point.id}  {point.name}{clients}{took}{sent}")
    say(f"{counted(len(sweep.points), 'point')} of experiment {sweep.experiment}; {basis}")
    known = [each.seconds for each in found if each.seconds is not None]
    if len(known) == len(found):
        at_once = room.jobs or 1
        say(f"in all {span(sum(known) / at_once)}, {at_once} at a time")


def overview(*, say: Say = print) -> None:
    """Say which sweeps ship, and how those there are stand."""
    say("sweeps that ship (graft sweep NAME --dry-run lists the points of one):")
    for name in shipped():
        say(f"  {name}")
    there = sorted(path.parent for path in sweeps_folder().glob(f"*/{FILE}"))
    if there:
        say(f"under {sweeps_folder()}:")
    for folder in there:
        sweep = read_sweep(folder)
        statuses = Counter(point.status for point in sweep.points)
        words = ", ".join(f"{count} {status}" for status, count in statuses.items())
        say(f"  {folder.name}: {words or 'no points yet'}")


def rebuild(name: str, *, say: Say = print) -> None:
    """Write table and plots of a sweep again, whatever its state."""
    folder = find_sweep(name)
    for path in write_tables(folder, read_sweep(folder)):
        say(str(path))


def _source(folder: Path, sweep: Sweep) -> Source:
    return Sampled(folder, sweep) if sweep.search else Listed(sweep.points)


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
    fixed = [f"{key}={text}" for key, text in sweep.search.get("fixed", {}).items()]
    listed = [point.overrides for point in sweep.points] or [fixed]
    if not limits.jobs and any(_on_gpu(sweep, overrides) for overrides in listed):
        say("points compute on a GPU, whose memory is not shared out: one at a time (or --jobs N)")
        limits = find_limits(1, room.cores, room.memory_gb)
    left = sum(point.open for point in sweep.points)
    left += sweep.search.get("points", len(sweep.points)) - len(sweep.points)
    at_once = limits.jobs or max(1, left)
    share = max(1, limits.cores // at_once)

    configs = {point.id: config_of(sweep, point) for point in sweep.points}

    def config(point: Point) -> Config:
        if point.id not in configs:  # sampled just now
            configs[point.id] = config_of(sweep, point)
        return configs[point.id]

    def need(point: Point) -> int:
        return max(share, cores_needed(config(point), point.clients, limits.cores))

    def federation(task: Task) -> str:
        return federation_of(config(task.point), task.point.clients, need(task.point))

    how = f"{limits.jobs} at a time" if limits.jobs else "as many at a time as fit"
    say(f"{how}: {limits.cores} cores, {limits.memory_mb / 1024:.1f} GB")
    return limits, Simulated(sweep.experiment, federation), need


def _on_gpu(sweep: Sweep, overrides: list[str]) -> bool:
    runtime = load_config(sweep.experiment, overrides).runtime
    return {runtime.client_device, runtime.trunk_device} != {"cpu"}


def _display(sweep: Sweep, total: int, say: Say) -> AbstractContextManager[Display]:
    if sys.stderr.isatty():
        return Bar(sweep, total, Console(stderr=True))
    return nullcontext(Lines(sweep, total, say))
