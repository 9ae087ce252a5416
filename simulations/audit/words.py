"""An audit as a table, and in words what it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ["attack", "reads", "knows", "metric", "found", "95 % interval", "chance", "of"]

KNOWS = {
    "exact": "the ends of the step",
    "round": "the ends of the round's start",
    "pretrained": "the ends of the run's start",
    "public": "the architecture, public text",
}


def rows(told: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows, a metric each."""
    return [
        [
            row["attack"],
            row["reads"],
            KNOWS[row["knowledge"]],
            row["metric"],
            f"{row['mean']:.3f}",
            "-" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}",
            "-" if row["chance"] is None else f"{row['chance']:.3f}",
            str(row["count"]),
        ]
        for row in told["rows"]
    ]


def notes(told: Mapping[str, Any]) -> list[str]:
    """What the table does not say."""
    seeds = len(told["seeds"])
    lines = [
        f"Recorded in {seeds} runs of {told['scope']['clients']} clients; intervals are over these "
        "seeds (Student's t). Chance is the best guess that looks at nothing."
    ]
    for name, one in told["calibration"].items():
        lines.append(
            f"Calibration of {name}: {one['found']:.3f} of a planted leak (must be "
            f"{one['must_find']:.3f}), {one['shuffled']:.3f} on shuffled data (may be "
            f"{one['must_not_pass']:.3f})."
        )
    lines += [f"{name}: {why}." for name, why in told["refused"].items()]
    return lines
