"""How commands take changes and print results: what they share."""

from __future__ import annotations

import json
import shlex
from typing import Annotated, Any

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to the experiment: train.lr=1e-3 cut.bottom=2", metavar="KEY=VALUE"
    ),
]

Speculate = Annotated[
    str,
    typer.Option(
        help="Several tokens for one trip to the trunk: auto, bridge, lookup or off; by default "
        "auto with --access."
    ),
]
DraftTokens = Annotated[int, typer.Option(help="Guessed at a time; 0: as suits.", min=0)]


def joined(overrides: list[str] | None) -> str:
    """Return overrides as one string that `conf.load` splits as a shell does."""

    return shlex.join(overrides or [])


def progress(line: str) -> None:
    """Print a line that is no result, beside the results."""
    typer.echo(line, err=True)


def figures(result: dict[str, Any], as_json: bool) -> None:
    """Print what was measured; a table where all of a kind have the same columns."""
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    rows = {key: value for key, value in result.items() if isinstance(value, dict)}
    if len({tuple(row) for row in rows.values()}) > 1:
        rows = {}  # what is counted by kind has no common columns
    width = max(len(key) for key in result)
    for key, value in result.items():
        if key not in rows:
            typer.echo(f"{key:<{width}}  {_short(value)}")
    if rows:
        columns = list(next(iter(rows.values())))
        cells = [[key, *(_short(row[name]) for name in columns)] for key, row in rows.items()]
        table(["", *columns], cells)


def number(value: float | None) -> str:
    """Return a loss in three digits, and a dash for none."""
    return "-" if value is None else f"{value:.3f}"


def table(columns: list[str], rows: list[list[Any]]) -> None:
    """Print aligned columns that survive a pipe."""
    cells = [columns, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
