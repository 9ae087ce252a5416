"""Commands that run an experiment: simulated, resumed, deployed."""

from __future__ import annotations

from typing import Annotated

import typer

from simulations.cli.show import Overrides, joined

commands = typer.Typer()


@commands.command(rich_help_panel="Run")
def demo(
    verbose: Annotated[bool, typer.Option(help="Show Flower's own lines too.")] = False,
) -> None:
    """Train a small split transformer across simulated clients (what `make demo` does)."""
    from simulations.launch.run import demo as run_demo

    run_demo(typer.echo, verbose)


@commands.command(rich_help_panel="Run")
def run(
    experiment: Annotated[str, typer.Argument(help="A name that `graft config` lists, or a file.")],
    overrides: Overrides = None,
    clients: Annotated[
        int, typer.Option(help="Simulated clients; 0: Flower's default, 2.", min=0)
    ] = 0,
    verbose: Annotated[bool, typer.Option(help="Show Flower's own lines too.")] = False,
) -> None:
    """Run an experiment with simulated clients, on a SuperLink of its own."""
    from simulations.launch.run import run_experiment

    run_experiment(experiment, joined(overrides), clients=clients, say=typer.echo, verbose=verbose)


@commands.command(rich_help_panel="Run")
def resume(
    run: Annotated[
        str, typer.Argument(help="A run folder, its name in `graft runs`, or a checkpoint of it.")
    ],
    overrides: Overrides = None,
    clients: Annotated[
        int, typer.Option(help="Simulated clients; 0: as many as before.", min=0)
    ] = 0,
    verbose: Annotated[bool, typer.Option(help="Show Flower's own lines too.")] = False,
) -> None:
    """Go on with a run that was stopped or killed, after its last checkpoint."""
    from simulations.launch.run import resume_run

    resume_run(run, joined(overrides), clients=clients, say=typer.echo, verbose=verbose)


@commands.command("deployment-demo", rich_help_panel="Run")
def deployment_demo(
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Leave out TLS and node authentication.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Show Flower's own lines too.")] = False,
) -> None:
    """Run the app under a real SuperLink and two SuperNodes, each with a data file of its own."""
    from simulations.deploy.demo import deployment_demo as run_deployment

    run_deployment(insecure=insecure, say=typer.echo, verbose=verbose)
