"""The command that attacks what a run lets a curious server see."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulations.cli.show import Overrides, figures, progress, table

commands = typer.Typer()


@commands.command(rich_help_panel="Check and measure")
def audit(
    subject: Annotated[
        str,
        typer.Argument(help="A run, an experiment, or its file.", metavar="RUN_OR_EXPERIMENT"),
    ] = "demo",
    overrides: Overrides = None,
    attacks: Annotated[str, typer.Option(help="search,labels; empty: all.")] = "",
    seeds: Annotated[str, typer.Option(help="A recording for each.")] = "0,1,2",
    warm: Annotated[
        int, typer.Option(help="Steps before; 0: the round is the run's first.", min=0)
    ] = 40,
    steps: Annotated[int, typer.Option(help="Of the recorded round.", min=1)] = 8,
    clients: Annotated[int, typer.Option(help="That train.", min=1)] = 2,
    sequences: Annotated[int, typer.Option(help="Attacked, of each client.", min=1)] = 4,
    text: Annotated[
        str, typer.Option(help="Attack this text's h1 alone; 'sentence': one that is built in.")
    ] = "",
    threads: Annotated[int, typer.Option(help="Torch threads; 0: torch's choice.", min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Where the result goes, as JSON; by default into the run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Attack what crosses the cuts: what a curious server, and other clients, learn."""
    import json

    from flower_app.build import set_threads
    from simulations.audit.audit import audit as run
    from simulations.audit.begin import find_subject, keep
    from simulations.audit.recording import Scope
    from simulations.audit.sentence import SENTENCE, read_sentence
    from simulations.report.leakage import COLUMNS, notes, rows

    set_threads(threads)
    asked = find_subject(subject, overrides or [])
    if text:
        text = SENTENCE if text == "sentence" else text
        figures(read_sentence(asked.config, text, trained=asked.trained), as_json)
        return
    told = run(
        asked.config,
        [each.strip() for each in attacks.split(",") if each.strip()],
        _numbers(seeds),
        trained=asked.trained,
        scope=Scope(clients=clients, warm=warm, steps=steps, sequences=sequences),
        say=progress,
    )
    written = keep(told, asked.folder, out)
    if as_json:
        typer.echo(json.dumps(told, indent=1))
        return
    table(COLUMNS, rows(told))
    for line in [*notes(told), *([f"in {written}"] if written else [])]:
        typer.echo(line)


def _numbers(seeds: str) -> list[int]:
    try:
        return [int(each) for each in seeds.split(",")]
    except ValueError as error:
        raise ValueError(f"--seeds={seeds!r} is no list of whole numbers, such as 0,1,2") from error
