"""Makes a report of run folders and sweeps, in the forms that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flower_app.runs.folders import find_run
from flower_app.runs.history import read_history
from simulations.report.compare import compare
from simulations.report.export import as_json, clients_csv, rounds_csv
from simulations.report.markdown import markdown
from simulations.report.numbers import describe
from simulations.report.page import render
from simulations.report.settings import labels
from simulations.sweep.state import find_sweep, is_sweep, read_sweep, sweeps_folder

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
    folders, title, home = find(names)
    runs = [describe(read_history(folder)) for folder in folders]
    comparison = compare(runs) if len(runs) > 1 else None
    for run, label in zip(runs, labels(runs), strict=True):
        run["label"] = label
    stem = (out or home / STEM).absolute()
    stem = stem.with_suffix("") if stem.suffix[1:] in FORMS else stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    made: dict[str, Callable[[], dict[str, str]]] = {
        "html": lambda: {".html": render(runs, comparison, title)},
        "md": lambda: {".md": markdown(runs, comparison, title)},
        "json": lambda: {".json": as_json(runs, comparison)},
        "csv": lambda: {".rounds.csv": rounds_csv(runs), ".clients.csv": clients_csv(runs)},
    }
    written = []
    for form in forms:
        for suffix, text in made[form]().items():
            path = stem.with_name(stem.name + suffix)
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written


def find(names: Sequence[str]) -> tuple[list[Path], str, Path]:
    """Return run folders, each once; what they are called together; and where a report goes."""
    found: dict[Path, None] = {}
    title, home = "", Path.cwd()
    for name in names:
        sweep = _sweep(name)
        if sweep is None:
            here = Path(name)
            home = here.resolve() if here.is_dir() else find_run(name)
            found[home] = None
            continue
        told, home = read_sweep(sweep), sweep
        title = f"Sweep {told.name}"
        runs = [Path(point.run) for point in told.points if point.run]
        found |= {run.resolve(): None for run in runs if run.is_dir()}
    if not found:
        raise ValueError(f"{', '.join(names)}: no point of it has a run folder yet")
    if len(names) > 1:
        title, home = "", Path.cwd()
    return list(found), title, home


def _sweep(name: str) -> Path | None:
    """The folder of a sweep of this name, if it is one's."""
    here = (Path(name).expanduser(), sweeps_folder() / name)
    return find_sweep(name) if any(map(is_sweep, here)) else None
