"""The command that opens a page in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command(rich_help_panel="Use")
def ui(
    source: Annotated[
        str,
        typer.Argument(
            help="A run (folder, name, last:demo), or a model with --cut; empty: the newest run.",
            metavar="[RUN_OR_MODEL]",
        ),
    ] = "",
    access: Annotated[
        Path | None,
        typer.Option(help="The access file of a trunk that `graft serve` holds.", metavar="FILE"),
    ] = None,
    ends: Annotated[
        str, typer.Option(help="Bottom and top, where the source is not here.", metavar="DIR")
    ] = "",
    cut: Annotated[str, typer.Option(help="Blocks below and above the trunk: 2,1")] = "",
    bind: Annotated[
        str, typer.Option(help="Address and port; beyond this machine it needs a password.")
    ] = "127.0.0.1:7860",
    user: Annotated[str, typer.Option(help="Who logs in, where there is a password.")] = "graft",
    password: Annotated[
        str | None,
        typer.Option(help="Better in GRAFT_UI_PASSWORD: others see what a command was given."),
    ] = None,
) -> None:
    """Open a page in the browser: chat with a model, and the runs with their curves.

    Without an access file a trunk of your own is started beside it, and ends with it.
    """
    from simulations.plan import units
    from simulations.ui.begin import Door, What, begin

    where = units.cut(cut) if cut else None
    begin(
        What(source=source, cut=where, access=access, ends=ends),
        Door(bind=bind, user=user, password=password),
        typer.echo,
    )
