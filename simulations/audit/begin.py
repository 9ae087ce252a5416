"""Finds what is to be audited by the name that the user gave, and keeps what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.load import experiments, load_config
from conf.schema import Config
from flower_app.runs.folders import SUMMARY, find_run, model_of, read_summary
from flower_app.runs.journal import replace_whole
from simulations.report.leakage import LEAKAGE


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is audited."""

    config: Config
    trained: str = ""
    """Folder of the model that the run has left; empty: it begins anew."""
    folder: Path | None = None
    """Of the run; None of an experiment."""


def find_subject(name: str, overrides: Sequence[str]) -> Asked:
    """What a name means.

    Parameters
    ----------
    name : str
        An experiment, its file, or a run as `graft runs` shows it.
    overrides : sequence of str
        Over its configuration.

    Raises
    ------
    ValueError
        If there is no such run or experiment.
    """
    if name in experiments() or name.endswith((".yaml", ".yml")):
        return Asked(config=load_config(name, list(overrides)))
    run = find_run(name)
    model = model_of(run)
    return Asked(
        config=load_config(str(run / "config.yaml"), list(overrides)),
        trained=str(model) if model else "",
        folder=run,
    )


def keep(told: Mapping[str, Any], run: Path | None, out: Path | None) -> Path | None:
    """Write what an audit came to, into the run's folder if no file is named; returns where.

    The run's summary gets its heads: attack, knowledge, metric, and what was found.
    """
    path = out or (run / LEAKAGE if run else None)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, json.dumps(told, indent=1) + "\n")
    if run is not None and (summary := read_summary(run)) is not None:
        heads = ("attack", "who", "knowledge", "held", "metric", "mean", "low", "high", "chance")
        found = [{key: row[key] for key in heads} for row in told["rows"] if row["main"]]
        summary["leakage"] = {"found": found, "refused": told["refused"]}
        replace_whole(run / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return path
