"""The `graft` command: every tool of Graft in one place.

Each command imports what it needs, so that `graft --help` does not wait for torch.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup


class _Plain(TyperGroup):
    """Print an error that is the user's to mend as one line instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; ValueError and OSError end it with code 2, RuntimeError with 1.

        `graft --verbose` shows the traceback.
        """
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, RuntimeError) as error:
            if ctx.params.get("verbose"):
                raise
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1 if isinstance(error, RuntimeError) else 2) from None


app = typer.Typer(
    cls=_Plain,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Federated split learning of transformers: clients keep their data and the ends of the "
    "model, the server trains the middle.\n\n"
    "Start with [bold]graft demo[/bold]. Runs of your own: [bold]graft run[/bold], or "
    "[bold]flwr run . --stream[/bold] in the project folder.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure what splitting costs and saves.")
app.add_typer(bench, name="bench", rich_help_panel="Check and measure")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to the experiment: train.lr=1e-3 cut.bottom=2", metavar="KEY=VALUE"
    ),
]


@app.callback()
def configure(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what libraries log, and tracebacks.")
    ] = False,
) -> None:
    """Set up logging, which only entry points do."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars among the results
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


@app.command(rich_help_panel="Run")
def demo(
    verbose: Annotated[bool, typer.Option(help="Show Flower's own lines too.")] = False,
) -> None:
    """Train a small split transformer across simulated clients (what `make demo` does)."""
    from simulations.launch.run import demo as run_demo

    run_demo(typer.echo, verbose)


@app.command(rich_help_panel="Run")
def run(
    experiment: Annotated[str, typer.Argument(help="A name that `graft config` lists, or a file.")],
    overrides: Overrides = None,
    clients: Annotated[int, typer.Option(help="Simulated clients; 0: Flower's default, 2.")] = 0,
    verbose: Annotated[bool, typer.Option(help="Show Flower's own lines too.")] = False,
) -> None:
    """Run an experiment with simulated clients, on a SuperLink of its own."""
    from simulations.launch.run import run_experiment

    run_experiment(experiment, _joined(overrides), clients=clients, say=typer.echo, verbose=verbose)


@app.command(rich_help_panel="Run")
def resume(
    run: Annotated[
        str, typer.Argument(help="A run folder, its name in `graft runs`, or a checkpoint of it.")
    ],
    overrides: Overrides = None,
    clients: Annotated[int, typer.Option(help="Simulated clients; 0: as many as before.")] = 0,
    verbose: Annotated[bool, typer.Option(help="Show Flower's own lines too.")] = False,
) -> None:
    """Go on with a run that was stopped or killed, after its last checkpoint."""
    from simulations.launch.run import resume_run

    resume_run(run, _joined(overrides), clients=clients, say=typer.echo, verbose=verbose)


@app.command("deployment-demo", rich_help_panel="Run")
def deployment_demo(
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Leave out TLS and node authentication.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Show Flower's own lines too.")] = False,
) -> None:
    """Run the app under a real SuperLink and two SuperNodes, each with a data file of its own."""
    from simulations.deploy.demo import deployment_demo as run_deployment

    run_deployment(insecure=insecure, say=typer.echo, verbose=verbose)


@app.command(rich_help_panel="Look")
def config(
    experiment: Annotated[str, typer.Argument(help="A name or a file; empty: list them.")] = "",
    overrides: Overrides = None,
) -> None:
    """Print the configuration that a run would use, or the experiments there are."""
    from conf.load import experiments, load_config, to_yaml

    if experiment:
        from flower_app.check import check_names  # with torch

        found = load_config(experiment, _joined(overrides))
        check_names(found)
        typer.echo(to_yaml(found), nl=False)
        return
    typer.echo("experiments (graft config NAME prints one, graft run NAME runs it):")
    for name in experiments():
        typer.echo(f"  {name}")


@app.command(rich_help_panel="Look")
def runs(
    folder: Annotated[str, typer.Option(help="Parent of the run folders.")] = "",
) -> None:
    """List the runs, the newest last; `unfinished` is one that was stopped or is still going."""
    from flower_app.runs.folders import (
        UNFINISHED,
        newest_round,
        read_summaries,
        runs_folder,
        unfinished_runs,
    )

    resumable = []

    rows = [
        [
            path.name,
            summary["status"],
            summary["rounds"],
            summary["clients"],
            f"{_number(summary['eval_loss_first'])} -> {_number(summary['eval_loss_last'])}",
            f"{summary['tokens_per_second']:,.0f}",
            f"{summary['seconds']:.0f}",
        ]
        for path, summary in read_summaries(folder)
    ]
    for path in unfinished_runs(folder):
        rounds = newest_round(path)
        rows.append([path.name, UNFINISHED, "-" if rounds is None else rounds, *"----"])
        resumable += [] if rounds is None else [path.name]
    if not rows:
        typer.echo(f"no run has ended under {runs_folder(folder)}; `graft demo` makes one")
        return
    columns = ["run", "status", "rounds", "clients", "held-out loss", "tokens/s", "seconds"]
    _table(columns, sorted(rows, key=lambda row: row[0]))
    typer.echo(f"under {runs_folder(folder)}")
    if resumable:
        where = runs_folder(folder) / resumable[-1] if folder else resumable[-1]
        typer.echo(f"unfinished runs with rounds can go on: graft resume {where}")


@app.command(rich_help_panel="Look")
def plot(
    run: Annotated[str, typer.Argument(help="A run folder, or its name as `graft runs` shows it.")],
) -> None:
    """Draw the loss of a run again, also of one that was killed."""
    from flower_app.runs.folders import runs_folder
    from flower_app.runs.plots import plot_loss

    folder = Path(run) if Path(run).is_dir() else runs_folder() / run
    if not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{run} is not a run: there is no {folder / 'metrics.jsonl'}")
    typer.echo(plot_loss(folder.resolve()))


@app.command(rich_help_panel="Look")
def families() -> None:
    """List the model families whose split is tested to be exact."""
    from models.families import tested_families

    for name in tested_families():
        typer.echo(name)


@app.command(rich_help_panel="Check and measure")
def parity(
    model: Annotated[str, typer.Option(help="Folder or hub id of a model.")] = "",
    cut: Annotated[
        list[str] | None,
        typer.Option(help="Blocks below and above the trunk, as 2,1; may be repeated."),
    ] = None,
    attention: Annotated[str, typer.Option(help="sdpa, eager or both.")] = "both",
    allow_untested: Annotated[
        bool, typer.Option("--allow-untested", help="Try a family outside the tested table.")
    ] = False,
    families: Annotated[
        bool, typer.Option("--families", help="A tiny model of every named family.")
    ] = False,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Every claim of equality, on --model or on tiny models."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a split model with the unsplit one: logits and every gradient, padded and not.

    With --all compare training, too: splitfed-v1 with FedAvg, merged with centralised training,
    one transport with the other.
    """
    if everything:
        if families or cut:
            raise ValueError("--all chooses models and cuts itself: leave out --families and --cut")
        _equivalence(model, attention, allow_untested, as_json)
        return
    if families == bool(model):
        raise ValueError("give either --model PATH_OR_ID or --families, or --all")
    cuts = [_cut(text) for text in cut or []]

    from simulations.equality import parity as tool

    if families:
        report = tool.run_families(attention=attention, say=lambda line: typer.echo(line, err=True))
    else:
        report = tool.run_parity(model, cuts, attention, allow_untested)
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else tool.render(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command(rich_help_panel="Check and measure")
def fuzz(
    inputs: Annotated[int, typer.Option(help="How many frames.", min=1)] = 100_000,
    seed: Annotated[int, typer.Option(help="Equal seeds send alike.")] = 0,
    only: Annotated[
        int, typer.Option(help="Only up to this input, from where its sequence begins; -1: all.")
    ] = -1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Send random, damaged and hostile frames to the decoder and to whole sessions."""
    from simulations.disturb.fuzz import fuzz as run_fuzz

    result = run_fuzz(inputs, seed, only if only >= 0 else None, _progress)
    _figures(result, as_json)
    if result["crashes"]:
        raise typer.Exit(1)


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
    _figures(result, as_json)
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

    result = measure(steps, strategy, say=_progress)
    _figures(result, as_json)
    if not (result["flat"] and result["clean"]):
        raise typer.Exit(1)


@bench.command("step")
def bench_step(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    steps: Annotated[int, typer.Option(help="Timed steps of each kind.", min=1)] = 40,
    wire: Annotated[str, typer.Option(help="Type on the wire: fp32, fp16 or bf16.")] = "fp32",
) -> None:
    """Compare a split training step, over real gRPC, with the unsplit step."""
    from simulations.bench.step import bench_step as measure

    _figures(measure(steps=steps, wire=wire), as_json)


@bench.command("memory")
def bench_memory(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the peak memory of each role with that of the whole model."""
    from simulations.bench.memory import bench_memory as measure

    _figures(measure(), as_json)


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

    def say(line: str) -> None:
        typer.echo(line, err=True)

    _figures(measure(clients, fraction, rounds, steps, transport, say), as_json)


@app.command(rich_help_panel="Check and measure")
def study(
    quick: Annotated[bool, typer.Option("--quick", help="The same in small, in a minute.")] = False,
    out: Annotated[str, typer.Option(help="Folder for the results; empty: a new one.")] = "",
) -> None:
    """Compare how six ways of training learn: table and plot of held-out loss over tokens."""
    from flower_app.runs.folders import new_folder, runs_folder
    from simulations.study.settings import QUICK, Study
    from simulations.study.study import run_study

    name = "quick" if quick else "full"
    folder = Path(out) if out else new_folder(runs_folder().parent / "studies", name)
    run_study(QUICK if quick else Study(), folder, say=typer.echo)
    typer.echo(f"in {folder.absolute()}")


@app.command(rich_help_panel="Check and measure")
def chaos(
    schedules: Annotated[int, typer.Option(help="Disturbed runs.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Of the first; the others count on.")] = 0,
    policy: Annotated[
        list[str] | None, typer.Option(help="splitfed-v1, splitfed-v2, merged, merged-step.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Disturb whole runs: frames lost, doubled, swapped, cut, delayed, damaged; clients and trunk
    killed. Each must end like an undisturbed run, bit for bit, or with a documented error."""
    from simulations.disturb import chaos as tool
    from simulations.disturb.chaos_run import POLICIES

    if unknown := sorted(set(policy or ()) - POLICIES.keys()):
        raise ValueError(f"--policy {unknown[0]}: there are {', '.join(POLICIES)}")
    summary = tool.run_chaos(
        schedules, seed, policies=policy or POLICIES, say=lambda line: typer.echo(line, err=True)
    )
    typer.echo(json.dumps(summary.as_dict(), indent=2) if as_json else tool.render(summary))
    if summary.lost:
        raise typer.Exit(1)


def _progress(line: str) -> None:
    typer.echo(line, err=True)


def _equivalence(model: str, attention: str, allow_untested: bool, as_json: bool) -> None:
    from simulations.equality import report as tool

    report = tool.run_equivalence(
        model,
        attention=attention,
        allow_untested=allow_untested,
        say=lambda line: typer.echo(line, err=True),
    )
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else tool.render(report))
    if not report.ok:
        raise typer.Exit(1)


def _joined(overrides: list[str] | None) -> str:
    """Return overrides as one string that `conf.load` splits as a shell does."""
    import shlex

    return shlex.join(overrides or [])


def _cut(text: str) -> tuple[int, int]:
    bottom, comma, top = text.partition(",")
    if not (comma and bottom.strip().isdecimal() and top.strip().isdecimal()):
        raise ValueError(f"--cut {text}: give blocks below and above the trunk, as 2,1")
    return int(bottom), int(top)


def _figures(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    # A table where all have the same columns; what is counted by kind has none.
    nested = {key: value for key, value in result.items() if isinstance(value, dict)}
    alike = len({tuple(value) for value in nested.values()}) <= 1
    rows = nested if alike else {}
    width = max(len(key) for key in result)
    for key, value in result.items():
        if key not in rows:
            typer.echo(f"{key:<{width}}  {_short(value)}")
    if rows:
        columns = list(next(iter(rows.values())))
        cells = [[key, *(_short(row[name]) for name in columns)] for key, row in rows.items()]
        _table(["", *columns], cells)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(columns: list[str], rows: list[list[Any]]) -> None:
    """Print aligned columns that survive a pipe."""
    cells = [columns, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


if __name__ == "__main__":
    app()
