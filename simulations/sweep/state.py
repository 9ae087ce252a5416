"""`sweep.json`: what a sweep is and how each of its points stands, written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from conf.sections.link import in_words
from flower_app.runs.folders import RunLock, runs_folder
from flower_app.runs.journal import replace_whole

FILE = "sweep.json"
PENDING, RUNNING, STOPPED = "pending", "running", "stopped"
FINISHED, CRASHED, PRUNED = "finished", "crashed", "pruned"
OPEN = (PENDING, RUNNING, STOPPED)
"""A point of these is still to be run, or goes on."""


@dataclass(kw_only=True)
class Point:
    """One run of a sweep, and how it stands."""

    id: str
    values: dict[str, Any]
    """What is swept, as the configuration reads it, without the seed; `clients` if it is swept."""
    seed: int
    clients: int
    """Simulated; 0: as many as the SuperLink has."""
    overrides: list[str]
    """Over the sweep's experiment: all that the run takes."""
    rounds: int = 0
    """That it is to train."""
    status: str = PENDING
    run: str = ""
    """The run folder, once it has one."""
    run_id: str = ""
    """Of Flower, on the SuperLink that was named."""
    error: str = ""
    seconds: float = 0.0
    """By the clock, Flower's start included, over all tries."""
    peak_mb: float = 0.0
    """Most memory that its processes had at once; 0: not measured."""

    @property
    def open(self) -> bool:
        """Whether it is still to be run, or goes on."""
        return self.status in OPEN

    @property
    def name(self) -> str:
        """Its values in a line."""
        words = [f"{key}={shown(value)}" for key, value in self.values.items()]
        return " ".join([*words, f"seed={self.seed}"])


@dataclass(kw_only=True)
class Sweep:
    """A sweep as its folder holds it."""

    name: str
    experiment: str
    keys: list[str]
    """Swept ones, in order, without the seed."""
    points: list[Point]
    superlink: str = ""
    """The connection of the user's Flower configuration; empty: simulated on this machine."""
    plot: list[str] = field(default_factory=list)
    """What heat maps show: columns of the results."""
    search: dict[str, Any] = field(default_factory=dict)
    """How points are sampled; empty: all are there from the beginning."""

    def count(self, *statuses: str) -> int:
        """How many points stand so."""
        return sum(point.status in statuses for point in self.points)


def read_sweep(folder: Path) -> Sweep:
    """Read a sweep's folder; a ValueError if it is none."""
    path = folder / FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        known = {each.name for each in fields(Point)}
        points = [
            Point(**{key: value for key, value in point.items() if key in known})
            for point in tree["points"]
        ]
        return Sweep(**{key: tree[key] for key in (e.name for e in fields(Sweep)) if key in tree}
                     | {"points": points})  # fmt: skip
    except FileNotFoundError:
        raise ValueError(f"{folder} is no sweep: it has no {FILE}") from None
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Write a sweep into its folder, so that a kill leaves the old state or the new one."""
    replace_whole(folder / FILE, json.dumps(asdict(sweep), indent=1) + "\n")


def sweeps_folder() -> Path:
    """Return the parent of the sweeps' folders, which is beside the runs."""
    return runs_folder().parent / "sweeps"


def is_sweep(folder: Path) -> bool:
    """Return whether a folder is a sweep's."""
    return (folder / FILE).is_file()


def find_sweep(name: str) -> Path:
    """Return a sweep's folder by its path, its name below `sweeps_folder`, or the sweep's name.

    Of several sweeps of that name, the newest.
    """
    stamp = len("20260101-000000-")
    named = [path for path in sweeps_folder().glob("*") if path.name[stamp:] == name]
    for folder in (Path(name).expanduser(), sweeps_folder() / name, *sorted(named, reverse=True)):
        if is_sweep(folder):
            return folder.resolve()
    raise ValueError(
        f"{name!r} is no sweep: neither {Path(name).absolute()} nor {sweeps_folder() / name} has a "
        f"{FILE} (`graft sweep` lists the sweeps)"
    )


def lock_sweep(folder: Path) -> RunLock:
    """Take the right to run a sweep, which one process has at a time."""
    try:
        return RunLock(folder)
    except ValueError:
        raise ValueError(f"{folder} is being run by another process; end that one first") from None


def shown(value: Any) -> str:
    """Return a value as it is written on a command line."""
    value = in_words(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(shown(each) for each in value) + "]"
    return str(value) or "''"


def counted(number: int, what: str) -> str:
    """Return `1 point` or `2 points`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
