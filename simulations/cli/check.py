"""Commands that check what Graft promises: equality, and what it survives."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from simulations.cli.show import figures, progress

commands = typer.Typer()


@commands.command(rich_help_panel="Check and measure")
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
        report = tool.run_families(attention=attention, say=progress)
    else:
        report = tool.run_parity(model, cuts, attention, allow_untested)
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else tool.render(report))
    if not report.ok:
        raise typer.Exit(1)


@commands.command(rich_help_panel="Check and measure")
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

    result = run_fuzz(inputs, seed, only if only >= 0 else None, progress)
    figures(result, as_json)
    if result["crashes"]:
        raise typer.Exit(1)


@commands.command(rich_help_panel="Check and measure")
def chaos(
    schedules: Annotated[int, typer.Option(help="Disturbed runs.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Of the first; the others count on.")] = 0,
    policy: Annotated[
        list[str] | None, typer.Option(help="splitfed-v1, splitfed-v2, merged, merged-step.")
    ] = None,
    window: Annotated[
        list[int] | None, typer.Option(help="Micro-batches under way at once; may be repeated.")
    ] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="Of all four crossings; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Disturb whole runs: frames lost, doubled, swapped, cut, delayed, damaged; clients and trunk
    killed. Each must end like an undisturbed run that waits for every frame's answer, bit for bit,
    or with a documented error."""
    from simulations.disturb import chaos as tool
    from simulations.disturb.chaos_run import POLICIES
    from strategies.transport.codec.registry import find_codec

    if unknown := sorted(set(policy or ()) - POLICIES.keys()):
        raise ValueError(f"--policy {unknown[0]}: there are {', '.join(POLICIES)}")
    for name in codec or ():
        find_codec(name)
    summary = tool.run_chaos(
        schedules,
        seed,
        policies=policy or POLICIES,
        windows=window or tool.WINDOWS,
        codecs=codec or tool.CODECS,
        say=progress,
    )
    typer.echo(json.dumps(summary.as_dict(), indent=2) if as_json else tool.render(summary))
    if summary.lost:
        raise typer.Exit(1)


def _equivalence(model: str, attention: str, allow_untested: bool, as_json: bool) -> None:
    from simulations.equality import report as tool

    report = tool.run_equivalence(
        model, attention=attention, allow_untested=allow_untested, say=progress
    )
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else tool.render(report))
    if not report.ok:
        raise typer.Exit(1)


def _cut(text: str) -> tuple[int, int]:
    bottom, comma, top = text.partition(",")
    if not (comma and bottom.strip().isdecimal() and top.strip().isdecimal()):
        raise ValueError(f"--cut {text}: give blocks below and above the trunk, as 2,1")
    return int(bottom), int(top)
