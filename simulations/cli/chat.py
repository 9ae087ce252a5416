"""The command that talks with what was trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from simulations.cli.show import DraftTokens, Speculate

commands = typer.Typer()

Own = Annotated[float | None, typer.Option(help="By default, the model's own.")]
Stops = Annotated[list[str] | None, typer.Option(help="An answer ends before it; may be repeated.")]


@commands.command(rich_help_panel="Use")
def chat(
    source: Annotated[
        str,
        typer.Argument(
            help="A run (folder, name, last:demo), or a model with --cut.",
            metavar="[RUN_OR_MODEL]",
        ),
    ] = "",
    cut: Annotated[str, typer.Option(help="Blocks below and above the trunk: 2,1")] = "",
    access: Annotated[
        Path | None, typer.Option(help="What `graft serve` wrote; else, a trunk of one's own.")
    ] = None,
    ends: Annotated[
        str, typer.Option(help="Bottom and top for --access, if not RUN_OR_MODEL's.")
    ] = "",
    model: Annotated[str, typer.Option(help="With --access: which of the models served.")] = "",
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Always the likeliest token: temperature 0.")
    ] = False,
    temperature: Own = None,
    top_p: Own = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of an answer, at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same answers each time.")] = None,
    stop: Stops = None,
    speculate: Speculate = "",
    draft_tokens: DraftTokens = 0,
    load: Annotated[Path | None, typer.Option(help="Go on with what /save wrote.")] = None,
) -> None:
    """Talk with a model: at the terminal, or with each line of the input as a message.

    Without a terminal, answers alone go to the output: echo hello | graft chat last:demo
    """
    if greedy and temperature:
        raise ValueError(f"--greedy is temperature 0, and --temperature {temperature:g} was given")
    if sys.stdin.isatty() and sys.stdout.isatty():
        typer.secho("loading ...", dim=True)  # torch alone takes seconds

    from simulations.chat.begin import begin
    from simulations.plan import units
    from simulations.talk.opening import Asked

    chosen = {
        "temperature": 0.0 if greedy else temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    asked = Asked(
        source=source,
        cut=units.cut(cut) if cut else None,
        access=access,
        ends=ends,
        model=model,
        speculate=speculate,
        draft_tokens=draft_tokens,
    )
    if not begin(asked, chosen, system=system, load=load):
        raise typer.Exit(1)
