"""The command that shows a run as it goes."""

from __future__ import annotations

from typing import Annotated

import typer

commands = typer.Typer()


@commands.command(rich_help_panel="Look")
def watch(
    run: Annotated[
        str,
        typer.Argument(
            help="A run folder, or its name in `graft runs`; empty: the newest that is going."
        ),
    ] = "",
    once: Annotated[bool, typer.Option("--once", help="Print one frame, and end.")] = False,
    interval: Annotated[
        float, typer.Option(help="Seconds between two looks.", min=0.1, max=3600)
    ] = 1.0,
) -> None:
    """Show a run as it goes: rounds, losses, each client, throughput, memory, time left.

    Its folder suffices: somebody else may have started it. Ctrl-C leaves the run alone.
    """
    from simulations.watch.watch import watch as show

    show(run, once=once, interval=interval)
