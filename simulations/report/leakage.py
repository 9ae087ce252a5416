"""What an audit of a run found, as a table: who attacked with what, and how much came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulations.report.tables import NONE, Table

LEAKAGE = "leakage.json"
"""In a run's folder: what `graft audit` made of it."""
NOT_AUDITED = "This run was not audited: `graft audit RUN` measures what it lets the server read."
KNOWS = {
    "exact": "the ends of the step",
    "round": "the ends of the round's start",
    "pretrained": "the ends of the run's start",
    "public": "the architecture, public text",
}
NOT_HELD = " (which this run's {who} does not see)"
COLUMNS = ["attack", "who", "reads", "knows", "metric", "found", "95 % interval", "chance", "of"]


def read_leakage(folder: Path) -> dict[str, Any] | None:
    """What an audit left in a run's folder; None if there is none that can be read."""
    try:
        told = json.loads((folder / LEAKAGE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return told if isinstance(told, dict) and isinstance(told.get("rows"), list) else None


def leakage(run: Mapping[str, Any]) -> Table:
    """One row a metric of an attack; none if the run was not audited."""
    told = run.get("leakage")
    if not told:
        return Table(columns=COLUMNS, rows=[], note=NOT_AUDITED)
    return Table(columns=COLUMNS, rows=rows(told), left=5, note=" ".join(notes(told)))


def rows(told: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows of an audit."""
    return [
        [
            row["attack"],
            _who(row),
            row["reads"],
            KNOWS.get(row["knowledge"], row["knowledge"])
            + ("" if row["held"] else NOT_HELD.format(who=_who(row))),
            row["metric"],
            f"{row['mean']:.3f}",
            NONE if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}",
            NONE if row["chance"] is None else f"{row['chance']:.3f}",
            str(row["count"]),
        ]
        for row in told["rows"]
    ]


def _who(row: Mapping[str, Any]) -> str:
    """Audits of before had no other attacker than the server, and did not say so."""
    return str(row.get("who", "server"))


def notes(told: Mapping[str, Any]) -> list[str]:
    """What the table does not say."""
    begins = "what the run has trained" if told["trained"] else "the start, in a run of its own"
    lines = [
        f"Audited from {begins}, {len(told['seeds'])} times with {told['scope']['clients']} "
        "clients; intervals are over these (Student's t). Chance is the best guess that looks at "
        "nothing."
    ]
    for name, one in told["calibration"].items():
        lines.append(
            f"Calibration of {name}: {one['found']:.3f} of a planted leak (at least "
            f"{one['must_find']:.3f}), {one['shuffled']:.3f} on shuffled data (at most "
            f"{one['must_not_pass']:.3f})."
        )
    return lines + [f"{name}: {why}." for name, why in told["refused"].items()]
