"""The command that puts a slow network between a trunk and its clients."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command(rich_help_panel="Check and measure")
def relay(
    to: Annotated[str, typer.Option(help="HOST:PORT that is passed on to: link.bind.")],
    listen: Annotated[
        str, typer.Option(help="HOST:PORT to connect to: link.advertise; port 0: any.")
    ] = "127.0.0.1:0",
    rtt: Annotated[str, typer.Option(help="Round trip: 50ms, half of it each way.")] = "0ms",
    bandwidth: Annotated[str, typer.Option(help="Each way: 100Mbit; empty: unlimited.")] = "",
    jitter: Annotated[str, typer.Option(help="Most that a piece is late: 2ms.")] = "0ms",
) -> None:
    """Pass TCP connections on over a slow network, until Ctrl-C: latency, bandwidth, jitter.

    graft relay --to 127.0.0.1:9000 --listen 127.0.0.1:9001 --rtt 50ms --bandwidth 100Mbit, and
    beside it graft run demo link.bind=127.0.0.1:9000 link.advertise=127.0.0.1:9001
    """
    from simulations.cli.show import progress
    from simulations.network.relay import Network, Relay
    from simulations.plan import units

    network = Network(
        rtt=units.latency(rtt),
        bandwidth=units.bandwidth(bandwidth) if bandwidth else None,
        jitter=units.latency(jitter),
    )
    with Relay(to, network, listen) as passing:
        limit = f", {units.in_short(network.bandwidth)}bit/s each way" if network.bandwidth else ""
        progress(f"{passing.address} -> {to}: {units.in_time(network.rtt)} round trip{limit}")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            up, down = (units.in_bytes(count) for count in (passing.bytes_up, passing.bytes_down))
            typer.echo(f"{up} up, {down} down")
