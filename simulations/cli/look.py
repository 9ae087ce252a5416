"""Commands that show what there is: configurations, runs, families."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from simulations.cli.show import Overrides, joined, number, table

commands = typer.Typer()


@commands.command(rich_help_panel="Look")
def config(
    experiment: Annotated[str, typer.Argument(help="A name or a file; empty: list them.")] = "",
    overrides: Overrides = None,
) -> None:
    """Print the configuration that a run would use, or the experiments there are."""
    from conf.load import experiments, load_config, to_yaml

    if experiment:
        from flower_app.check import check_names

        found = load_config(experiment, joined(overrides))
        check_names(found)
        typer.echo(to_yaml(found), nl=False)
        return
    typer.echo("experiments (graft config NAME prints one, graft run NAME runs it):")
    for name in experiments():
        typer.echo(f"  {name}")


@commands.command(rich_help_panel="Look")
def runs(
    folder: Annotated[str, typer.Option(help="Parent of the run folders.")] = "",
) -> None:
    """List the runs, the newest last; `unfinished` is one that was stopped or killed."""
    from flower_app.runs import folders
    from flower_app.runs.history import RUNNING, status_of

    ended = dict(folders.read_summaries(folder))
    others = {path: status_of(path, None) for path in folders.unfinished_runs(folder)}
    last = {path: folders.newest_round(path) for path in others}
    rows = [
        _ended(path.name, ended[path])
        if path in ended
        else _not_ended(path.name, others[path], last[path])
        for path in folders.in_order([*ended, *others])
    ]
    where = folders.runs_folder(folder)
    if not rows:
        typer.echo(f"no run has ended under {where}; `graft demo` makes one")
        return
    columns = ["run", "status", "rounds", "clients", "held-out loss", "tokens/s", "seconds"]
    table(columns, rows)
    typer.echo(f"under {where}")
    stopped = [path for path, status in others.items() if status != RUNNING]
    if resumable := [path for path in stopped if last[path] is not None]:
        run = resumable[-1] if folder else resumable[-1].name
        typer.echo(f"unfinished runs with rounds can go on: graft resume {run}")


def _not_ended(name: str, status: str, last: int | None) -> list[Any]:
    return [name, status, "-" if last is None else last, *"----"]


def _ended(name: str, summary: dict[str, Any]) -> list[Any]:
    speed, seconds = summary.get("tokens_per_second"), summary.get("seconds")
    return [
        name,
        summary["status"],
        summary.get("rounds", "-"),
        summary.get("clients", "-"),
        f"{number(summary.get('eval_loss_first'))} -> {number(summary.get('eval_loss_last'))}",
        "-" if speed is None else f"{speed:,.0f}",
        "-" if seconds is None else f"{seconds:.0f}",
    ]


@commands.command(rich_help_panel="Look")
def plot(
    run: Annotated[str, typer.Argument(help="A run folder, or its name as `graft runs` shows it.")],
) -> None:
    """Draw the loss of a run again, also of one that was killed."""
    from flower_app.runs.folders import runs_folder
    from flower_app.runs.history import read_history
    from flower_app.runs.plots import plot_loss

    folder = Path(run) if Path(run).is_dir() else runs_folder() / run
    if not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{run} is not a run: there is no {folder / 'metrics.jsonl'}")
    typer.echo(plot_loss(read_history(folder.resolve())))


@commands.command(rich_help_panel="Look")
def families() -> None:
    """List the model families whose split is tested to be exact."""
    from models.families import tested_families

    for name in tested_families():
        typer.echo(name)
