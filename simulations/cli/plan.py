"""The command that predicts a run: memory, operations, bytes and seconds of a cut."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from simulations.cli.show import Overrides

commands = typer.Typer()

Text = typer.Option


@commands.command(rich_help_panel="Look")
def plan(
    model: Annotated[str, typer.Argument(help="A folder or hub id of a model, or an experiment.")],
    overrides: Overrides = None,
    cut: Annotated[str, Text(help="Blocks below and above the trunk: 2,1")] = "",
    batch: Annotated[str, Text(help="Sequences x tokens: 8x512")] = "",
    bandwidth: Annotated[str, Text(help="Each way: 100Mbit, 1Gbit")] = "1Gbit",
    latency: Annotated[str, Text(help="Of a round trip: 50ms")] = "1ms",
    client_flops: Annotated[
        str, Text(help="Sustained FLOP/s of a client: 2T; empty: measure this machine")
    ] = "",
    server_flops: Annotated[str, Text(help="Sustained FLOP/s of the server: 60T")] = "",
    clients: Annotated[int, Text(help="That train at once; 0: federation.min_clients", min=0)] = 0,
    steps: Annotated[int, Text(help="Of a client in a round; 0: train.local_steps", min=0)] = 0,
    client_memory: Annotated[str, Text(help="What a client may hold: 8GB, 8GiB")] = "",
    server_memory: Annotated[str, Text(help="What the server may hold: 24GB")] = "",
    lora: Annotated[int, Text(help="Adapters of this rank in all parts", min=0)] = 0,
    full: Annotated[bool, typer.Option("--full", help="Train every weight")] = False,
    dtype: Annotated[str, Text(help="Of weights: fp32, bf16, fp16")] = "",
    precision: Annotated[str, Text(help="Of compute: fp32, bf16")] = "",
    wire: Annotated[str, Text(help="On the wire, as link.codec: fp32, bf16, int4")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict memory, operations, bytes and seconds of a cut, before anything runs or loads.

    Of a model only its config.json is read. graft plan lora cut.bottom=2 plans an experiment.
    """
    from simulations.plan import units
    from simulations.plan.cuts import Budgets
    from simulations.plan.plan import Setting, make_plan
    from simulations.plan.question import Shorthand, configure
    from simulations.plan.seconds import Network
    from simulations.plan.words import show

    short = Shorthand(
        cut=cut,
        batch=batch,
        lora=lora,
        full=full,
        dtype=dtype,
        precision=precision,
        wire=wire,
    )
    config = configure(model, short, overrides or [])
    setting = Setting(
        network=Network(bandwidth=units.bandwidth(bandwidth), latency=units.latency(latency)),
        clients=clients or config.federation.min_clients,
        client_speed=units.speed(client_flops) if client_flops else 0.0,
        server_speed=units.speed(server_flops) if server_flops else 0.0,
        steps=steps,
        budgets=Budgets(
            client=units.memory(client_memory) if client_memory else 0,
            server=units.memory(server_memory) if server_memory else 0,
        ),
    )
    found = make_plan(config, setting)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found)
