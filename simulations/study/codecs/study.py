"""Trains each condition with each codec and seed that is not there yet, and keeps a line of each.

``graft study codecs`` leaves `runs.jsonl`, from which `codecs.md`, `codecs.json` and `codecs.png`
are made, by this command or a later one: what was cut off goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simulations.study.codecs import report
from simulations.study.codecs.settings import BASE, Condition, Mix, parse_mix
from simulations.study.codecs.trained import Run, train

RUNS = "runs.jsonl"

Line = dict[str, Any]
"""A `Run` as JSON has it."""


def study_codecs(
    condition: Condition,
    mixes: Iterable[Mix],
    seeds: Sequence[int],
    folder: Path,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run what is missing and make table and plot of all that is there.

    Parameters
    ----------
    condition : Condition
        What is trained.
    mixes : iterable of Mix
        What is compared; the base comes first, whether it is named or not.
    seeds : sequence of int
        Of the runs.
    folder : Path
        Where `runs.jsonl` is, or will be.
    say : callable
        Hears of each run.

    Returns
    -------
    dict
        What `codecs.json` holds: see `report.summary`.

    Raises
    ------
    ValueError
        If the folder holds runs of the same title and of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = parse_mix(BASE)
    _check_same(condition, read_runs(folder))
    for seed in seeds:
        for mix in (base, *(mix for mix in mixes if mix != base)):
            # Read anew: another process may fill the same folder.
            if _key(asdict(condition), mix.name, seed) not in _keys(read_runs(folder)):
                run = train(condition, mix, seed)
                append(folder, run)
                say(
                    f"{condition.title}, seed {seed}, {mix.name}: held-out loss "
                    f"{run.loss_without:.4f}, through the codec {run.loss_with:.4f}, "
                    f"in {run.seconds:.0f} s"
                )
    return draw(folder)


def draw(folder: Path) -> dict[str, Any]:
    """Make table and plot of the runs in a folder; returns what `codecs.json` holds."""
    result = report.summary(read_runs(folder))
    (folder / "codecs.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "codecs.md").write_text(report.markdown(result), encoding="utf-8")
    report.plot(result, folder / "codecs.png")
    return result


def append(folder: Path, run: Run) -> None:
    """Add a run to the folder, in one piece."""
    with (folder / RUNS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(run)) + "\n")


def read_runs(folder: Path) -> list[Line]:
    """The runs of a folder. A last line that was cut off is taken away: its run comes again."""
    path = folder / RUNS
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _key(condition: Line, codec: str, seed: int) -> tuple[str, str, int]:
    return json.dumps(condition, sort_keys=True), codec, seed


def _keys(runs: Iterable[Line]) -> set[tuple[str, str, int]]:
    return {_key(run["condition"], run["codec"], run["seed"]) for run in runs}


def _check_same(condition: Condition, runs: Iterable[Line]) -> None:
    own = asdict(condition)
    for run in runs:
        other = Condition(**run["condition"])
        if other.title == condition.title and other != condition:
            unlike = [
                f"{name}={value} there, {own[name]} here"
                for name, value in run["condition"].items()
                if value != own[name]
            ]
            raise ValueError(
                f"the folder holds runs of '{other.title}' with other settings "
                f"({'; '.join(unlike)}): give the same ones, or another --out"
            )
