"""Commands that measure the wire: steps over slow networks, several clients, frames and codecs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from simulations.cli.bench import bench
from simulations.cli.show import figures, progress, table

T = TypeVar("T")


@bench.command("wire")
def bench_wire(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The whole grid, for hours.")] = False,
    rtt: Annotated[str, typer.Option(help="Round trips: 0ms,50ms.")] = "",
    bandwidth: Annotated[str, typer.Option(help="Each way: 10Mbit,1Gbit.")] = "",
    micro: Annotated[str, typer.Option(help="Micro-batches of a step: 1,4,8.")] = "",
    codec: Annotated[str, typer.Option(help="Codecs: bf16,int4,'h1=int4 h2=int6'.")] = "",
    window: Annotated[str, typer.Option(help="Micro-batches under way: 1,4.")] = "",
    sequences: Annotated[int, typer.Option(help="Of a micro-batch.", min=1)] = 8,
    turns: Annotated[int, typer.Option(help="Timed turns, of four steps each.", min=1)] = 3,
    out: Annotated[str, typer.Option(help="Leave JSON and plots in this folder.")] = "",
) -> None:
    """Compare a split step over slow networks with the unsplit step: seconds, and where they go.

    Without options: loopback, 50 ms with 100 Mbit/s, 100 ms with 1 Gbit/s. Whoever gives round
    trips, bandwidths or micro-batches has every combination of them.
    """
    from simulations.bench import wire
    from simulations.bench.wire_plot import columns, plot
    from simulations.plan import units

    points = wire.points_of(
        full,
        rtts=_list(rtt, units.latency),
        bandwidths=_list(bandwidth, units.bandwidth),
        micros=_list(micro, int),
        codecs=_list(codec, str),
        windows=_list(window, int),
    )
    sizes = {**wire.SIZES, "batch": sequences}
    result = wire.bench_wire(points, turns, progress, sizes)
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "wire.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        for path in plot(result, folder):
            progress(f"drew {path}")
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        table(*columns(result))


@bench.command("clients")
def bench_clients(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    clients: Annotated[str, typer.Option(help="Clients at once, each in turn.")] = "1,2,4,8",
    strategies: Annotated[str, typer.Option(help="Policies; empty: all.")] = "",
    micro: Annotated[int, typer.Option(help="Micro-batches of a step.", min=1)] = 1,
    window: Annotated[int, typer.Option(help="Of them under way at once.", min=1)] = 4,
    codec: Annotated[str, typer.Option(help="As link.codec.")] = "fp32",
    turns: Annotated[int, typer.Option(help="Timed turns, of three steps each.", min=1)] = 3,
    client_threads: Annotated[int, typer.Option(help="Torch's, of each client.", min=1)] = 1,
    trunk_threads: Annotated[
        int, typer.Option(help="Torch's, of the trunk; 0: 1 with replicas, else all cores.", min=0)
    ] = 0,
) -> None:
    """Compare clients that train at once on one trunk with the unsplit model on all cores."""
    from simulations.bench import clients as several

    asked = several.Asked(
        clients=tuple(_list(clients, int)) or several.Asked.clients,
        strategies=tuple(_list(strategies, str)),
        micros=micro,
        window=window,
        codec=codec,
        turns=turns,
        client_threads=client_threads,
        trunk_threads=trunk_threads,
    )
    result = several.bench_clients(asked, progress)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    rows = result.pop("rows")
    table(list(rows[0]), [list(row.values()) for row in rows])
    figures(result, False)


@bench.command("frames")
def bench_frames(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    megabytes: Annotated[float, typer.Option(help="Of the tensor in fp32.", min=0.01)] = 16.8,
    repeats: Annotated[int, typer.Option(help="Of which the median is told.", min=1)] = 7,
) -> None:
    """Build and read a frame, and encode and decode with each codec: ms per MB of fp32."""
    from simulations.bench.frames import bench_frames as measure

    figures(measure(megabytes, repeats), as_json)


def _list(text: str, read: Callable[[str], T]) -> list[T]:
    return [read(each) for each in text.split(",") if each.strip()]
