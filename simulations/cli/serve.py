"""The command that serves the trunk of what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN_OR_MODEL...",
        help="Runs (folders, or names in `graft runs`), models, adapters or exported parts.",
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Option("--name", metavar="NAME=SOURCE", help="The same, by a name; may be repeated."),
]
CutAt = Annotated[
    str, typer.Option(metavar="BELOW,ABOVE", help="Blocks that clients hold, of a plain model.")
]
Folder = Annotated[
    Path, typer.Option(metavar="DIR", help="Where the access files and the keys are.")
]


@commands.command(rich_help_panel="Use")
def serve(
    sources: Sources = None,
    name: Names = None,
    cut: CutAt = "",
    clients: Annotated[int, typer.Option(help="Access files to write.", min=1, max=1000)] = 1,
    access: Folder = Path("~/.graft/serve"),
    days: Annotated[float, typer.Option(help="A new access file is good for.", min=0)] = 0.0,
    bind: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1:8470",
    advertise: Annotated[str, typer.Option(help="Address clients use, if another.")] = "",
    tls: Annotated[str, typer.Option(help="auto (off on loopback), on or off.")] = "auto",
    certificate: Annotated[str, typer.Option(help="PEM of your own certificate.")] = "",
    key: Annotated[str, typer.Option(help="PEM of its key.")] = "",
    codec: Annotated[str, typer.Option(help="Of tensors on the wire, as link.codec.")] = "fp32",
    trunk_dtype: Annotated[str, typer.Option(help="The trunk is computed in.")] = "fp32",
    kv_mb: Annotated[float, typer.Option(help="MiB of keys and values, in all.", min=1)] = 1024.0,
    session_kv_mb: Annotated[float, typer.Option(help="MiB of one session's.", min=1)] = 512.0,
    idle: Annotated[float, typer.Option(help="Seconds before a session ends.", min=1)] = 600.0,
    max_sessions: Annotated[int, typer.Option(help="Sessions at once.", min=1, max=4096)] = 64,
    grace: Annotated[float, typer.Option(help="Seconds to end in, when asked.", min=0)] = 30.0,
    metrics_port: Annotated[int, typer.Option(help="For Prometheus; 0: none.", min=0)] = 0,
    metrics_host: Annotated[str, typer.Option(help="Address of the metrics.")] = "127.0.0.1",
    threads: Annotated[int, typer.Option(help="Torch threads; 0: torch's choice.", min=0)] = 0,
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Hold the trunk of a run or model, for clients that generate text with it.

    Each access file lets one client in: it goes to who may use the trunk, and to nobody else.
    """
    from dataclasses import replace

    from conf.schema import LinkConfig
    from conf.sections.link import read_codecs
    from flower_app.serving.requests import asked_to_stop
    from flower_app.serving.server import Serving, sources_of
    from flower_app.serving.server import serve as run
    from simulations.plan import units
    from strategies.transport.stream.generation import Policy

    link = LinkConfig(bind=bind, advertise=advertise, tls=tls, codec=read_codecs(codec))
    serving = Serving(
        sources=sources_of(sources or [], name or []),
        access=access.expanduser(),
        link=replace(link, certificate=certificate, key=key),
        cut=units.cut(cut) if cut else None,
        clients=clients,
        days=days,
        kv_mb=kv_mb,
        session_kv_mb=session_kv_mb,
        policy=Policy(sessions=max_sessions, idle=idle),
        metrics=(metrics_host, metrics_port),
        threads=threads,
        dtype=trunk_dtype,
    )
    with asked_to_stop(with_parent=with_parent) as asked:
        run(serving, grace=grace, asked=asked, say=typer.echo)
