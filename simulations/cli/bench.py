"""Commands that measure what splitting costs and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulations.cli.show import figures, progress, table

commands = typer.Typer()
bench = typer.Typer(no_args_is_help=True, help="Measure what splitting costs and saves.")
commands.add_typer(bench, name="bench", rich_help_panel="Check and measure")


@bench.command("load")
def bench_load(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    sessions: Annotated[int, typer.Option(help="Sessions at once.", min=1)] = 64,
    steps: Annotated[int, typer.Option(help="Steps of each.", min=1)] = 5,
    strategy: Annotated[str, typer.Option(help="As train.strategy.")] = "splitfed-v1",
) -> None:
    """Train over many sessions at once on one trunk: errors, memory, and what is left."""
    from simulations.bench.load import bench_load as measure

    result = measure(sessions, steps, strategy)
    figures(result, as_json)
    if not result["clean"]:
        raise typer.Exit(1)


@bench.command("soak")
def bench_soak(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    steps: Annotated[int, typer.Option(help="Steps in all.", min=1)] = 2000,
    strategy: Annotated[str, typer.Option(help="As train.strategy.")] = "splitfed-v1",
) -> None:
    """Train for long over a stream that breaks: does memory stay flat?"""
    from simulations.bench.soak import bench_soak as measure

    result = measure(steps, strategy, say=progress)
    figures(result, as_json)
    if not (result["flat"] and result["clean"]):
        raise typer.Exit(1)


@bench.command("step")
def bench_step(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    steps: Annotated[int, typer.Option(help="Timed steps of each kind.", min=1)] = 40,
    wire: Annotated[str, typer.Option(help="On the wire, as link.codec.")] = "fp32",
) -> None:
    """Compare a split training step, over real gRPC, with the unsplit step."""
    from simulations.bench.step import bench_step as measure

    figures(measure(steps=steps, wire=wire), as_json)


@bench.command("generate")
def bench_generate(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    model: Annotated[
        str, typer.Option(help="smollm2 or demo (their sizes, random weights), or a folder.")
    ] = "smollm2",
    tokens: Annotated[int, typer.Option(help="New tokens of each text.", min=2)] = 256,
    sessions: Annotated[str, typer.Option(help="Sessions at once, each in turn.")] = "1,4,16",
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 3,
    wire: Annotated[str, typer.Option(help="On the wire, as link.codec.")] = "fp32",
    threads: Annotated[int, typer.Option(help="Torch threads of each process.", min=1)] = 1,
) -> None:
    """Compare a token of generation, over real gRPC, with the unsplit model's."""
    from simulations.bench.generate import Asked
    from simulations.bench.generate import bench_generate as measure

    numbers = tuple(int(each) for each in sessions.split(",") if each.strip().isdecimal())
    if not numbers or 0 in numbers:
        raise ValueError(f"--sessions takes numbers of 1 or more, such as 1,4,16, not {sessions}")
    asked = Asked(
        model=model, tokens=tokens, sessions=numbers, rounds=rounds, wire=wire, threads=threads
    )
    figures(measure(asked, progress), as_json)


@bench.command("memory")
def bench_memory(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the peak memory of each role with that of the whole model."""
    from simulations.bench.memory import bench_memory as measure

    figures(measure(), as_json)


@bench.command("monitoring")
def bench_monitoring(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    steps: Annotated[int, typer.Option(help="Timed steps of each kind.", min=10)] = 200,
) -> None:
    """Compare steps that are recorded, tracked and metered with steps that are not."""
    from simulations.bench.monitoring import bench_monitoring as measure

    figures(measure(steps=steps), as_json)


@bench.command("scale")
def bench_scale(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    clients: Annotated[int, typer.Option(help="Simulated clients.", min=1)] = 100,
    fraction: Annotated[float, typer.Option(help="Share of them in a round.")] = 0.1,
    rounds: Annotated[int, typer.Option(help="Rounds.", min=3)] = 5,
    steps: Annotated[int, typer.Option(help="Steps of a client in a round.", min=1)] = 2,
    transport: Annotated[str, typer.Option(help="stream, messages or both.")] = "both",
) -> None:
    """Run many simulated clients, few in a round: seconds and memory, round by round."""
    from simulations.bench.scale import bench_scale as measure

    figures(measure(clients, fraction, rounds, steps, transport, progress), as_json)


@bench.command("compare")
def bench_compare(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The same in small.")] = False,
    out: Annotated[str, typer.Option(help="Leave JSON, tables and figure in this folder.")] = "",
) -> None:
    """Compare the unsplit model, central and federated, with every strategy: one table."""
    import json

    from simulations.bench.compare.compare import bench_compare as measure
    from simulations.bench.compare.report import notes, tables

    result = measure(quick, Path(out) if out else None, progress)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    for columns, rows in tables(result):
        table(columns, rows)
        typer.echo("")
    for note in notes(result):
        typer.echo(note)


@bench.command("plan")
def bench_plan(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    steps: Annotated[int, typer.Option(help="Steps of each model, timed thrice.", min=1)] = 5,
    cases: Annotated[str, typer.Option(help="Some of them: llama,gpt2; empty: all.")] = "",
) -> None:
    """Compare what `graft plan` foretells with real steps; 1 if it is further off than it may."""
    from simulations.bench.plan import bench_plan as measure
    from simulations.bench.plan import columns

    result = measure(steps, [name.strip() for name in cases.split(",") if name.strip()], progress)
    if as_json:
        figures(result, as_json)
    else:
        table(*columns(result))
        figures({key: result[key] for key in ("resident", "worst", "bounds", "within")}, False)
    if not result["within"]:
        raise typer.Exit(1)
