"""The command that reports on runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command(rich_help_panel="Look")
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run or sweep folders, or names as `graft runs` shows them.", metavar="RUN..."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file. By default report.html in the folder.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="Some of html, md, json, csv, with commas between.")
    ] = "",
) -> None:
    """Write a report of a run, or of several side by side, as a page for screen and paper."""
    from simulations.report.report import FORMS, write_report

    suffix = out.suffix[1:] if out is not None and out.suffix[1:] in FORMS else "html"
    forms = [each.strip() for each in (format or suffix).split(",") if each.strip()]
    for path in write_report(runs, out, forms):
        typer.echo(path)
