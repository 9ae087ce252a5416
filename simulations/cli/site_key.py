"""Commands for ends that the server never sees: the sites' key, and a model of masked ends."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()
keys = typer.Typer(no_args_is_help=True, help="The secret that the sites of a federation share.")
commands.add_typer(keys, name="site-key", rich_help_panel="Run")


@keys.callback()
def _keys() -> None:
    """The secret that the sites of a federation share, and the server does not have."""


@keys.command()
def new(file: Annotated[Path, typer.Argument(help="Where to; must not be there.")]) -> None:
    """Make a key, in a file that only you can read. Bring it to the other sites, not to the
    server."""
    from flower_app.client.site_key import new_site_key, read_site_key

    try:
        new_site_key(file.expanduser())
    except FileExistsError as error:
        raise ValueError(
            f"{file} is there already, and what was masked with it needs it: take another name"
        ) from error
    typer.echo(f"{file} (check {read_site_key(file.expanduser()).check.hex()})")


@commands.command(rich_help_panel="Use")
def unmask(
    run: Annotated[
        str, typer.Argument(help="A run of privacy.ends=masked: its folder or name.", metavar="RUN")
    ],
    site_key: Annotated[Path, typer.Option(help="The file with the sites' secret.")],
    to: Annotated[Path, typer.Option(help="The model's folder; must not be there.")],
) -> None:
    """Put the model of a run with masked ends together, at a site: it has the sites' key."""
    from flower_app.exports.unmask import unmask as write

    typer.echo(write(run, site_key.expanduser(), to.expanduser()))
