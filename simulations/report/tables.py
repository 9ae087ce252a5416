"""The tables of a report, in words and figures: the page and Markdown show the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flower_app.runs.instants import instant
from simulations.report.numbers import PARTS
from simulations.report.settings import settings, shown

NONE = "–"
MOST_ROWS = 400
"""Of a table of rounds: beyond, every n-th is shown."""
MOST_MISSING = 200
NAMED = 12
"""Clients that a cell names."""

Run = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells are text; a column whose name ends the list of `left` ones is a number."""

    columns: list[str]
    rows: list[list[str]]
    left: int = 1
    """Columns at the beginning that are words; the others are figures, `words` apart."""
    words: tuple[str, ...] = ()
    note: str = ""


def overview(runs: Sequence[Run]) -> Table:
    """One row a run: how it ended, and what it came to."""
    columns = ["run", "status", "rounds", "clients", "held-out loss", "perplexity", "tokens"]
    columns += ["MB up", "MB down", "time", "tokens/s"]
    rows = [_overview(run) for run in runs]
    if all(run["label"] == run["name"] for run in runs):
        return Table(columns=columns, rows=rows, left=2)
    labelled = [[row[0], run["label"], *row[1:]] for run, row in zip(runs, rows, strict=True)]
    return Table(columns=["run", "setting", *columns[1:]], rows=labelled, left=3)


def _overview(run: Run) -> list[str]:
    told = run["summary"]
    return [
        run["name"],
        run["status"],
        f"{told['rounds']} of {told['planned'] if told['planned'] is not None else NONE}",
        str(told["clients"]),
        f"{loss(told['heldout_first'])} → {loss(told['heldout_last'])}",
        figure(told["perplexity_last"]),
        whole(told["tokens"]),
        megabytes(told["bytes_up"]),
        megabytes(told["bytes_down"]),
        duration(told["seconds"]),
        whole(told["tokens_per_second"]),
    ]


def seeds(comparison: Mapping[str, Any]) -> Table:
    """One row a setting: mean and spread over its seeds."""
    rows = [
        [
            each["setting"],
            str(len(each["runs"])),
            str(len(each["final"])),
            ", ".join(map(shown, each["seeds"])),
            loss(each["mean"]),
            loss(each["spread"]),
        ]
        for each in comparison["settings"]
    ]
    return Table(
        columns=["setting", "runs", "finished", "seeds", "mean of last held-out loss", "± sd"],
        rows=rows,
    )


def tests(comparison: Mapping[str, Any]) -> Table:
    """One row a pair of settings: does the second end higher or lower than the first?"""
    rows = [
        [
            f"{each['other']} − {each['one']}",
            each["words"],
            str(each["n"]),
            signed(each["difference"]),
            NONE if each["low"] is None else f"{signed(each['low'])} to {signed(each['high'])}",
            NONE if each["p"] is None else f"{each['p']:.3g}",
        ]
        for each in comparison["tests"]
    ]
    columns = ["difference", "in words", "n", "mean difference", "95 % interval", "p"]
    return Table(columns=columns, rows=rows, left=2)


def differences(runs: Sequence[Run], keys: Sequence[str]) -> Table:
    """One row a run, and a column for each key that is not the same in all of them."""
    keys = [key for key in keys if key != "output.folder"]
    told = [(run["name"], settings(run)) for run in runs]
    rows = [[name, *(shown(each.get(key)) for key in keys)] for name, each in told]
    return Table(columns=["run", *keys], rows=rows if keys else [], left=len(keys) + 1)


def rounds(run: Run) -> Table:
    """One row a round: losses, who took part, traffic and time."""
    every, rows = _thin(run["rounds"], MOST_ROWS)
    columns = ["round", "train loss", "held-out loss", "perplexity", "server's file"]
    columns += ["answered", "attempts"]
    columns += ["tokens", "MB up", "MB down", "seconds", "tokens/s"]
    cells = [
        [
            str(each["round"]),
            loss(each["train_loss"]),
            loss(each["heldout_loss"]),
            figure(each["perplexity"]),
            loss(each["central_loss"]),
            f"{each['answered']} of {each['asked']}",
            str(each["attempts"]),
            whole(each["tokens"]),
            megabytes(each["bytes_up"]),
            megabytes(each["bytes_down"]),
            figure(each["seconds"]),
            whole(each["tokens"] / each["seconds"]) if each["seconds"] and each["tokens"] else NONE,
        ]
        for each in rows
    ]
    columns, cells = _without_empty(columns, cells)
    return Table(columns=columns, rows=cells, note=_every(every, "round"))


def phases(run: Run) -> Table:
    """One row a round: where its seconds went."""
    every, rows = _thin(run["rounds"], MOST_ROWS)
    cells = [
        [str(r["round"]), *(figure(r[f"{part}_seconds"]) for part in PARTS), figure(r["seconds"])]
        for r in rows
    ]
    names = ["start-up" if part == "startup" else part for part in PARTS]
    columns = ["round", *(f"{name} (s)" for name in (*names, "round"))]
    return Table(columns=columns, rows=cells, note=_every(every, "round"))


def memory(run: Run) -> Table:
    """One row a round: the server's memory, and its largest client's."""
    every, rows = _thin([r for r in run["rounds"] if r["server_mb"] or r["client_peak_mb"]], 60)
    names = ("server_mb", "server_peak_mb", "gpu_peak_mb", "client_peak_mb")
    titles = ("server", "server's peak", "GPU's peak", "largest client's peak")
    kept = [(n, t) for n, t in zip(names, titles, strict=True) if any(r[n] for r in rows)]
    cells = [[str(r["round"]), *(whole(r[name]) for name, _ in kept)] for r in rows]
    columns = ["round", *(f"{title} (MB)" for _, title in kept)]
    return Table(columns=columns, rows=cells, note=_every(every, "round"))


def clients(run: Run) -> Table:
    """One row a client: how it took part, what it moved, how it learns."""
    columns = ["client", "asked", "answered", "missing", "stood out"]
    columns += ["steps", "tokens", "share", "MB up"]
    columns += ["MB down", "s per step", "last train loss", "held-out loss", "peak MB"]
    tokens = sum(each["tokens"] for each in run["clients"])
    rows = [
        [
            each["client"],
            *(whole(each[name]) for name in ("asked", "answered", "missing")),
            whole(each["stood_out"] or None),
            *(whole(each[name]) for name in ("steps", "tokens")),
            f"{each['tokens'] / tokens:.1%}" if tokens else NONE,
            megabytes(each["bytes_up"]),
            megabytes(each["bytes_down"]),
            figure(each["seconds_per_step"]),
            loss(each["train_loss"]),
            loss(each["heldout_loss"]),
            whole(each["peak_mb"]),
        ]
        for each in run["clients"]
    ]
    columns, rows = _without_empty(columns, rows)
    return Table(columns=columns, rows=rows)


def missing(run: Run) -> Table:
    """One row for each reason why answers did not count, by round and attempt."""
    rows = [
        [
            each["label"],
            _names(names),
            ("undone attempt: " if each["undone"] else "") + why,
            NONE if each["at"] is None else figure(each["at"]),
        ]
        for each in run["participation"]
        for why, names in _by_reason(each["missing"]).items()
    ]
    note = ""
    if len(rows) > MOST_MISSING:
        note = f"The first {MOST_MISSING} of {len(rows)}; JSON has all."
    columns = ["asked in", "clients", "why their answers do not count", "asked at (s)"]
    return Table(columns=columns, rows=rows[:MOST_MISSING], left=3, note=note)


def _by_reason(missing: Mapping[str, str]) -> dict[str, list[str]]:
    told: dict[str, list[str]] = {}
    for name, why in sorted(missing.items()):
        told.setdefault(why, []).append(name)
    return told


def _names(names: Sequence[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def changed(run: Run) -> Table:
    """One row a key that is not as by default."""
    rows = [[key, shown(value), shown(default)] for key, value, default in run["changed"]]
    return Table(columns=["key", "value", "default"], rows=rows, left=3)


def configuration(run: Run) -> Table:
    """All keys."""
    rows = [[key, shown(value)] for key, value in run["config"].items()]
    return Table(columns=["key", "value"], rows=rows, left=2)


def environment(run: Run) -> Table:
    """What it was computed with."""
    rows = [[key.replace("_mb", " (MB)"), shown(v)] for key, v in run["environment"].items()]
    return Table(columns=["", "server"], rows=rows, left=2)


def loss(value: float | None) -> str:
    """A loss, in four digits behind the point."""
    return NONE if value is None else f"{value:.4f}"


def figure(value: float | None) -> str:
    """A number in four digits."""
    return NONE if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def whole(value: float | None) -> str:
    """A number without fractions."""
    return NONE if value is None else f"{value:,.0f}"


def signed(value: float | None) -> str:
    """A difference."""
    return NONE if value is None else f"{value:+.4f}".replace("-", "−")


def megabytes(value: float | None) -> str:
    """Bytes in MB."""
    return (
        NONE if value is None else f"{value / 1e6:,.1f}" if value >= 1e7 else f"{value / 1e6:.3g}"
    )


def duration(seconds: float | None) -> str:
    """Seconds in words."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:02} s"


def moment(text: str | None) -> str:
    """An instant to the second, in UTC."""
    return NONE if text is None else f"{instant(text):%Y-%m-%d %H:%M:%S} UTC"


def _thin(rows: Sequence[Any], most: int) -> tuple[int, list[Any]]:
    every = max(1, -(-len(rows) // most))
    return every, [*rows[::every]] + ([rows[-1]] if rows and (len(rows) - 1) % every else [])


def _every(every: int, what: str) -> str:
    return "" if every == 1 else f"Every {every}th {what} and the last are shown; CSV has all."


def _without_empty(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Leave out columns of which nothing is known."""
    keep = [i for i in range(len(columns)) if not i or any(row[i] != NONE for row in rows)]
    return [columns[i] for i in keep], [[row[i] for i in keep] for row in rows]
