"""The command that exports what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command(rich_help_panel="Use")
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A run (its folder, its name in `graft runs`, last:demo), one of its checkpoints, "
            "or a model.",
            metavar="RUN_OR_MODEL",
        ),
    ],
    format: Annotated[
        str,
        typer.Option(
            help="adapter: a PEFT folder. merged: a whole model for from_pretrained. parts: trunk "
            "and ends, each for itself."
        ),
    ] = "merged",
    to: Annotated[
        Path | None, typer.Option(help="The folder. By default in exports/ of the run's.")
    ] = None,
    round: Annotated[
        int | None, typer.Option(help="Of the round with this checkpoint, not the last.", min=0)
    ] = None,
    cut: Annotated[
        str, typer.Option(help="For parts: blocks below and above the trunk, 1,1; the run's own.")
    ] = "",
    license: Annotated[str, typer.Option(help="Of the weights, for the model card.")] = "unknown",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that holds an earlier export.")
    ] = False,
) -> None:
    """Export what was trained, as an adapter, a whole model, or trunk and ends apart."""
    from flower_app.exports.export import export as write
    from simulations.plan import units

    folder = write(
        model,
        format,
        to,
        number=round,
        cut=units.cut(cut) if cut else None,
        license=license,
        force=force,
    )
    typer.echo(folder)
