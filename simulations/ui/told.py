"""What the tab of the runs says of them in words and numbers, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from simulations.report.settings import labels
from simulations.report.tables import overview
from simulations.report.words import lead, problems, tiles

Run = dict[str, Any]

STATES = {
    "running": "going",
    "unfinished": "unfinished",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
}


def nothing(folder: str) -> str:
    """Say that there are no runs, and how to make one."""
    return (
        '<div class="empty"><h2>No runs yet</h2><p>There is none under '
        f"<code>{escape(folder)}</code>. Train a first one, in a minute or two:</p>"
        "<p><code>graft demo</code></p><p>It appears here while it goes.</p></div>"
    )


def choose() -> str:
    """Say that no run is chosen."""
    words = "Choose a run above, or several to lay them over each other."
    return f'<div class="empty"><p>{words}</p></div>'


def summary(runs: Sequence[Run]) -> str:
    """Return what one run came to, or several in a table."""
    if len(runs) == 1:
        return _one(runs[0])
    named = [{**run, "label": label} for run, label in zip(runs, labels(runs), strict=True)]
    table = overview(named)
    head = "".join(_cell("th", text, n >= table.left) for n, text in enumerate(table.columns))
    rows = "".join(
        f"<tr>{''.join(_cell('td', text, n >= table.left) for n, text in enumerate(row))}</tr>"
        for row in table.rows
    )
    return (
        '<div class="wide" tabindex="0"><table class="runs">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _one(run: Run) -> str:
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        f'<dd class="more">{escape(more)}</dd></div>'
        for name, value, more in tiles(run)
    )
    wrong = "".join(f'<p class="problem">{escape(words)}</p>' for words in problems(run))
    status = str(run["status"])
    state = f'<span class="state {escape(status)}">{escape(STATES.get(status, status))}</span>'
    return (
        f'<div class="run"><p class="lead">{state} {escape(lead(run))}</p>{wrong}'
        f'<dl class="tiles six">{cells}</dl></div>'
    )


def _cell(tag: str, text: str, number: bool) -> str:
    return f"<{tag}{' class=n' if number else ''}>{escape(text)}</{tag}>"
