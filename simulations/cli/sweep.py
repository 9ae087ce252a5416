"""The command that runs many points of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

commands = typer.Typer()

Changes = Annotated[
    list[str] | None,
    typer.Argument(
        help="What is swept, train.lr=1e-3,3e-3 seed=range(3), and what is fixed, train.rounds=2",
        metavar="KEY=V1,V2",
    ),
]


@commands.command(rich_help_panel="Run")
def sweep(
    what: Annotated[
        str, typer.Argument(help="An experiment, a sweep's file, or the name of one that ships.")
    ] = "",
    changes: Changes = None,
    clients: Annotated[str, typer.Option(help="Simulated clients, as 2,4.")] = "",
    resume: Annotated[str, typer.Option(help="Go on with the sweep of this folder.")] = "",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: crashed points again, too.")
    ] = False,
    table: Annotated[str, typer.Option(help="Write table and plots of this folder again.")] = "",
    dry: Annotated[
        bool, typer.Option("--dry-run", help="List and check the points, with an estimate.")
    ] = False,
    search: Annotated[
        int, typer.Option(help="Sample so many points with Optuna, from a,b or interval(a,b).")
    ] = 0,
    pruner: Annotated[
        str, typer.Option(help="Of a search, ends hopeless points: median, hyperband or none.")
    ] = "median",
    jobs: Annotated[str, typer.Option(help="Points at a time; auto: as many as fit.")] = "auto",
    cores: Annotated[int, typer.Option(help="Cores to use; 0: all.", min=0)] = 0,
    memory: Annotated[float, typer.Option(help="GB to use; 0: 90 % of what is free.", min=0)] = 0,
    superlink: Annotated[
        str, typer.Option(help="A connection of your Flower configuration to run on.")
    ] = "",
) -> None:
    """Run many points of an experiment, several at a time: table, plots, and a state to go on from.

    Without arguments: what there is.
    """
    from dataclasses import replace

    from simulations.sweep.spec import read_spec
    from simulations.sweep.state import CRASHED
    from simulations.sweep.sweep import Room, begin, dry_run, go_on, overview, rebuild

    if jobs != "auto" and not (jobs.isdecimal() and int(jobs)):
        raise ValueError(f"--jobs {jobs}: give auto, or a whole number, 1 or more")
    _check_together(
        {"--table": table, "--resume": resume, "a new sweep": what},
        {"KEY=V1,V2": changes, "--clients": clients, "--dry-run": dry, "--search": search,
         "--superlink": superlink},
        {"--retry-failed": retry_failed},
    )  # fmt: skip
    room = Room(jobs=0 if jobs == "auto" else int(jobs), cores=cores, memory_gb=memory)
    if table or not (what or resume):
        rebuild(table, say=typer.echo) if table else overview(say=typer.echo)
        return
    if resume:
        done = go_on(resume, room, retry=retry_failed, say=typer.echo)
    else:
        spec = read_spec(what, changes or [], clients)
        spec = replace(spec, search=search or spec.search)
        if dry:
            dry_run(spec, room, superlink, say=typer.echo)
            return
        done = begin(spec, room, superlink, pruner=pruner, say=typer.echo)
    if done.count(CRASHED):
        raise typer.Exit(1)


def _check_together(
    asked: Mapping[str, object], begins: Mapping[str, object], resumes: Mapping[str, object]
) -> None:
    """Refuse two wishes in one command, and options that would be passed over."""
    told = [name for name, there in asked.items() if there]
    if len(told) > 1:
        raise ValueError(f"{' and '.join(told)}: give one of them")
    own = {"a new sweep": begins, "--resume": resumes}
    for kind, options in own.items():
        if kind not in told and (unused := [name for name, there in options.items() if there]):
            needs = "names an experiment or a sweep" if options is begins else "has --resume FOLDER"
            raise ValueError(f"{', '.join(unused)}: only for a command that {needs}")
