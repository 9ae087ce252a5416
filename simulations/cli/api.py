"""the command that answers OpenAI's clients"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()


@commands.command(rich_help_panel="Use")
def api(
    source: Annotated[
        str,
        typer.Argument(
            help="A run (folder, name, last:demo), or a model with --cut.",
            metavar="[RUN_OR_MODEL]",
        ),
    ] = "",
    cut: Annotated[str, typer.Option(help="Blocks below and above the trunk: 2,1")] = "",
    access: Annotated[
        Path | None, typer.Option(help="What `graft serve` wrote; else, a trunk of one's own.")
    ] = None,
    ends: Annotated[
        str, typer.Option(help="Bottom and top for --access, if not RUN_OR_MODEL's.")
    ] = "",
    model: Annotated[str, typer.Option(help="With --access: which of the models served.")] = "",
    bind: Annotated[
        str, typer.Option(help="Address and port; beyond this machine it needs a key.")
    ] = "127.0.0.1:8000",
    api_key: Annotated[
        str,
        typer.Option(help="Better in GRAFT_API_KEY: others see what a command was given."),
    ] = "",
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file whose first line is the key.")
    ] = None,
    parallel: Annotated[int, typer.Option(help="Requests answered at a time.", min=1)] = 4,
    queue: Annotated[int, typer.Option(help="Requests that may wait beside them.", min=0)] = 16,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page that may ask (CORS); may be repeated. None by default."),
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM, to answer over https; with --tls-key.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM, of the certificate.")] = None,
) -> None:
    """Answer OpenAI's clients: chat and text completions, with streaming and log-probabilities.

    Any program with a base URL for OpenAI talks to the model so. Texts stay with this process;
    the trunk sees hidden vectors.
    """
    from simulations.api.begin import How, begin
    from simulations.plan import units
    from simulations.talk.opening import Asked

    where = units.cut(cut) if cut else None
    asked = Asked(source=source, cut=where, access=access, ends=ends, model=model)
    how = How(
        bind=bind,
        key=api_key,
        key_file=api_key_file,
        parallel=parallel,
        queue=queue,
        origins=tuple(allow_origin or ()),
        certificate=tls_certificate,
        private_key=tls_key,
    )
    begin(asked, how, typer.echo)
