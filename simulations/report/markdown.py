"""The report as Markdown: the page's tables and sentences, without its figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from conf import VERSION
from flower_app.runs.instants import now
from simulations.report import tables
from simulations.report.leakage import leakage
from simulations.report.tables import Table
from simulations.report.words import lead, problems, tiles, title

HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
MARKS = "\\`*_[]|"
TABLES = {
    "Rounds": tables.rounds,
    "Time by phase": tables.phases,
    "Clients": tables.clients,
    "Answers that do not count": tables.missing,
    "Memory": tables.memory,
    "What is not as by default": tables.changed,
    "Environment": tables.environment,
}


def markdown(
    runs: Sequence[Any],
    comparison: Mapping[str, Any] | None,
    name: str = "",
    notes: Sequence[str] = (),
) -> str:
    """Return the report of runs, several side by side; parameters as of `page.render`."""
    parts = [f"# {plain(name or title(runs))}", *(f"> {plain(note)}" for note in notes)]
    if comparison:
        parts += [table(tables.overview(runs)), "## What differs"]
        differences = tables.differences(runs, comparison["differing"])
        parts.append(table(differences) or "Nothing but the runs themselves.")
        parts += ["## Settings over their seeds", table(tables.seeds(comparison))]
        parts += [plain(comparison["words"]), table(tables.tests(comparison))]
    for run in runs:
        parts += _run(run, several=len(runs) > 1)
    parts.append(f"Written by Graft {VERSION}, {tables.moment(now())}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _run(run: Mapping[str, Any], *, several: bool) -> Iterator[str]:
    if several:
        yield f"# {plain(run['name'])}"
    yield plain(lead(run))
    for problem in problems(run):
        yield f"> {plain(problem)}"
    yield table(
        Table(columns=["", "value", "remark"], rows=[list(tile) for tile in tiles(run)], left=3)
    )
    for heading, make in TABLES.items():
        if (made := make(run)).rows:
            yield f"## {heading}"
            yield table(made)
    found = leakage(run)
    yield "## Leakage"
    yield table(replace(found, note=plain(found.note))) or found.note
    yield "## Commands"
    for words, command in run["commands"].items():
        ticks = max((len(run) for run in re.findall("`+", command)), default=0)
        fence = "`" * max(3, ticks + 1)
        yield f"{plain(words)}:\n\n{fence}bash\n{command}\n{fence}"


def table(made: Table) -> str:
    """Return a table in GitHub's Markdown, and its note; empty if there are no rows."""
    if not made.rows:
        return ""
    rule = [":--" if i < made.left else "--:" for i in range(len(made.columns))]
    rows = [[plain(cell) for cell in row] for row in (made.columns, *made.rows)]
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
    return "\n".join(lines) + (f"\n\n{made.note}" if made.note else "")


def plain(text: str) -> str:
    """Return a stranger's words so that Markdown and HTML take them as they are, on one line."""
    for char in MARKS:
        text = text.replace(char, f"\\{char}")
    for char, entity in HTML.items():
        text = text.replace(char, entity)
    return " ".join(text.split())
