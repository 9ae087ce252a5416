"""Makes a report of run folders and sweeps, in the forms that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flower_app.runs.folders import find_run
from flower_app.runs.history import read_history
from simulations.report.compare import compare
from simulations.report.export import as_json, clients_csv, rounds_csv
from simulations.report.leakage import read_leakage
from simulations.report.markdown import markdown
from simulations.report.numbers import describe
from simulations.report.page import render
from simulations.report.settings import labels
from simulations.sweep.state import CRASHED, OPEN, find_sweep, is_sweep, read_sweep, sweeps_folder

FORMS = ("html", "md", "json", "csv")
STEM = "report"


def write_report(names: Sequence[str], out: Path | None, forms: Sequence[str]) -> list[Path]:
    """Write a report of runs.

    Parameters
    ----------
    names : sequence of str
        Run folders or sweep folders, by path or by the name that `graft runs` shows.
    out : Path, optional
        The file, of which the suffix is each form's own. By default `report` in the run's or the
        sweep's folder if one is named, otherwise in the working folder.
    forms : sequence of str
        Some of `FORMS`.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    ValueError
        If there is no such run or form.
    """
    if unknown := [form for form in forms if form not in FORMS]:
        raise ValueError(f"--format {','.join(unknown)}: a report can be {', '.join(FORMS)}")
    asked = find(names)
    folders, title, notes = list(asked.folders), asked.title, asked.notes
    runs = [
        {**describe(read_history(folder)), "leakage": read_leakage(folder)} for folder in folders
    ]
    comparison = compare(runs) if len(runs) > 1 else None
    for run, label in zip(runs, labels(runs), strict=True):
        run["label"] = label
    stem = (out or asked.home / STEM).absolute()
    stem = stem.with_suffix("") if stem.suffix[1:] in FORMS else stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    made: dict[str, Callable[[], dict[str, str]]] = {
        "html": lambda: {".html": render(runs, comparison, title, notes)},
        "md": lambda: {".md": markdown(runs, comparison, title, notes)},
        "json": lambda: {".json": as_json(runs, comparison, notes)},
        "csv": lambda: {".rounds.csv": rounds_csv(runs), ".clients.csv": clients_csv(runs)},
    }
    written = []
    for form in forms:
        for suffix, text in made[form]().items():
            path = stem.with_name(stem.name + suffix)
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written


@dataclass(kw_only=True)
class Asked:
    """Runs that a report is asked for."""

    folders: dict[Path, None] = field(default_factory=dict)
    """Each once, in order."""
    title: str = ""
    """What they are called together; empty: nothing."""
    home: Path
    """Where the report goes if nobody says."""
    notes: list[str] = field(default_factory=list)
    """On points of sweeps that are no finished runs."""


def find(names: Sequence[str]) -> Asked:
    """Return the runs of these names; ValueError if one is neither a run nor a sweep."""
    asked = Asked(home=Path.cwd())
    for name in names:
        if (sweep := _sweep(name)) is not None:
            _add_sweep(asked, sweep)
            continue
        here = Path(name)
        asked.home = here.resolve() if here.is_dir() else find_run(name)
        asked.folders[asked.home] = None
    if not asked.folders:
        raise ValueError(f"{', '.join(names)}: no point of it has a run folder yet")
    if len(names) > 1:
        asked.title, asked.home = "", Path.cwd()
    return asked


def _add_sweep(asked: Asked, folder: Path) -> None:
    sweep = read_sweep(folder)
    asked.title, asked.home = f"Sweep {sweep.name}", folder
    for point in sweep.points:
        run = Path(point.run).resolve() if point.run else None
        if run is not None and run.is_dir():
            asked.folders[run] = None
        if point.status == CRASHED:
            asked.notes.append(f"{point.id} ({point.name}) crashed: {point.error}")
    if left := sweep.count(*OPEN):
        asked.notes.append(f"{left} of {len(sweep.points)} points are still to be run, or run now.")


def _sweep(name: str) -> Path | None:
    """The folder of a sweep of this name, if it is one's."""
    here = (Path(name).expanduser(), sweeps_folder() / name)
    return find_sweep(name) if any(map(is_sweep, here)) else None
