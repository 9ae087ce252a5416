"""The numbers of a report for other programs: JSON, and tidy CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conf import VERSION
from flower_app.runs.instants import now
from flower_app.runs.journal import dumps
from simulations.report.settings import differing, setting_of

FORMAT = 1
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a text begins with that a spreadsheet computes."""


def as_json(
    runs: Sequence[Any], comparison: Mapping[str, Any] | None, notes: Sequence[str] = ()
) -> str:
    """Return all numbers, those of every step too; curves are left to whoever draws them."""
    told = [{key: value for key, value in run.items() if key != "curves"} for run in runs]
    compared = None
    if comparison:
        settings = [
            {key: value for key, value in each.items() if key not in ("band", "places")}
            for each in comparison["settings"]
        ]
        compared = {**comparison, "settings": settings}
    whole = {"format": FORMAT, "graft": VERSION, "made": now(), "notes": list(notes), "runs": told}
    return dumps({**whole, "comparison": compared}) + "\n"


def rounds_csv(runs: Sequence[Any]) -> str:
    """Return a row for each run and round."""
    return _rows(runs, "rounds")


def clients_csv(runs: Sequence[Any]) -> str:
    """Return a row for each run, round and client."""
    return _rows(runs, "client_rounds")


def _rows(runs: Sequence[Any], of: str) -> str:
    keys = differing(runs)
    return _csv(_whose(run, keys) | row for run in runs for row in run[of])


def _whose(run: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {
        "run": run["name"],
        "setting": setting_of(run, keys),
        "seed": run["seed"],
        "status": run["status"],
    }


def _harmless(cell: Any) -> Any:
    """A cell that no spreadsheet takes for a formula; numbers, negative ones too, as they are."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    found = list(rows)
    text = io.StringIO()
    if found:
        writer = csv.DictWriter(text, fieldnames=list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _harmless(cell) for key, cell in row.items()} for row in found)
    return text.getvalue()
