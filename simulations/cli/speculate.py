"""The commands about speculation: what it saves, and a bridge for a model trained without one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulations.cli.bench import bench
from simulations.cli.show import figures, progress

commands = typer.Typer()


@bench.command("speculate")
def bench_speculate(
    source: Annotated[
        str, typer.Argument(help="A run or a model.", metavar="RUN_OR_MODEL")
    ] = "last:demo",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cut: Annotated[
        str, typer.Option(help="Blocks below and above the trunk, 2,2; the run's own.")
    ] = "",
    bridge: Annotated[
        Path | None, typer.Option(help="Folder of a bridge, if it is not beside the model.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A text to take prompts of, too.")] = None,
    modes: Annotated[str, typer.Option(help="Of off, lookup, bridge.")] = "off,lookup,bridge",
    rtt: Annotated[str, typer.Option(help="Round trip times in ms.")] = "0,20,80",
    prompts: Annotated[int, typer.Option(help="Of each text.", min=1)] = 3,
    tokens: Annotated[int, typer.Option(help="New ones, for each prompt.", min=1)] = 96,
    draft_tokens: Annotated[
        int, typer.Option(help="Guessed at a time; 0: as chats do.", min=0)
    ] = 0,
) -> None:
    """Generate with and without speculation: tokens for each trip to the trunk, ms per token."""
    from simulations.bench.speculate import Question
    from simulations.bench.speculate import bench_speculate as measure
    from simulations.plan import units

    question = Question(
        source=source,
        cut=units.cut(cut) if cut else None,
        bridge=bridge,
        data=data,
        modes=tuple(mode.strip() for mode in modes.split(",")),
        rtts=tuple(float(each) / 1000 for each in rtt.split(",")),
        prompts=prompts,
        tokens=tokens,
        draft_tokens=draft_tokens,
    )
    figures(measure(question, progress), as_json)


@commands.command(rich_help_panel="Use")
def bridge(
    source: Annotated[
        str, typer.Argument(help="A run, a model, or a folder of ends.", metavar="RUN_OR_MODEL")
    ],
    to: Annotated[Path, typer.Option(help="The folder that gets bridge.safetensors.")],
    data: Annotated[
        Path | None, typer.Option(help="File or folder with text; the demo's by default.")
    ] = None,
    cut: Annotated[
        str, typer.Option(help="Blocks below and above the trunk, 2,2; the run's own.")
    ] = "",
    access: Annotated[
        Path | None, typer.Option(help="Access file of the trunk that is served.")
    ] = None,
    width: Annotated[int, typer.Option(help="Of the layer inside.", min=1)] = 256,
    steps: Annotated[int, typer.Option(help="Batches to learn from.", min=1)] = 300,
    batch_size: Annotated[int, typer.Option(help="Texts in each.", min=1)] = 8,
    context: Annotated[int, typer.Option(help="Tokens of each text.", min=2)] = 128,
    seed: Annotated[int, typer.Option(help="Of the first weights and the order.", min=0)] = 0,
) -> None:
    """Make a bridge for a trained model, so that a client's ends can draft text for the trunk."""
    from simulations.plan import units
    from simulations.talk.bridging import Lesson, make_bridge

    lesson = Lesson(
        data=data, context=context, batch_size=batch_size, steps=steps, width=width, seed=seed
    )
    file = make_bridge(source, units.cut(cut) if cut else None, access, lesson, to, progress)
    typer.echo(f"in {file}")
