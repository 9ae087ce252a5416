"""The command that evaluates what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulations.cli.show import figures, progress

commands = typer.Typer()


@commands.command("eval", rich_help_panel="Use")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A run (its folder, its name in `graft runs`, last:demo), or a model.",
            metavar="RUN_OR_MODEL",
        ),
    ],
    data: Annotated[Path, typer.Option(help="File or folder: jsonl, csv, parquet, txt.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            help="How the file is read, if not as the run's: data.context=512",
            metavar="data.KEY=VALUE",
        ),
    ] = None,
    how: Annotated[
        str, typer.Option(help="split, unsplit, served, or all of them side by side.")
    ] = "",
    access: Annotated[
        Path | None, typer.Option(help="Access file of the trunk that is served.")
    ] = None,
    cut: Annotated[
        str, typer.Option(help="Blocks below and above the trunk, 1,1; the run's own.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="Type of the weights: fp32, bf16, fp16.")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="Texts at once.", min=1)] = 8,
    limit: Annotated[int, typer.Option(help="Most examples; 0: all.", min=0)] = 0,
    generate: Annotated[
        bool, typer.Option(help="Generate completions, for the exact match.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate what was trained: loss, perplexity, token accuracy, exact match."""
    from simulations.evaluate.evaluate import Question, run_evaluation
    from simulations.plan import units

    question = Question(
        model=model,
        data=data,
        how=how or ("split" if access is None else "served"),
        access=access,
        cut=units.cut(cut) if cut else None,
        dtype=dtype,
        changes=changes or (),
        batch_size=batch_size,
        limit=limit,
        generate=generate,
    )
    figures(run_evaluation(question, progress), as_json)
