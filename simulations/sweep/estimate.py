"""How long a sweep will take and how much it will send, by earlier runs of its experiment."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.load import load_config
from conf.rules import ConfigError
from conf.schema import Config
from flower_app.runs.folders import FINISHED, read_summaries
from simulations.sweep.state import FILE, Point, read_sweep, sweeps_folder

RUNS = 50
"""Earlier runs that are looked at, the newest."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a point will take, as far as earlier runs tell."""

    seconds: float | None
    """Flower's start included, where earlier sweeps have measured it."""
    mb: float | None
    """Both ways between clients and trunk."""


@dataclass(frozen=True, kw_only=True)
class _Before:
    """An earlier run."""

    config: Config
    clients: int
    seconds: float
    mb: float


def estimate(points: Sequence[Point], configs: Sequence[Config]) -> tuple[list[Estimate], str]:
    """Return an estimate for each point, and on what it rests.

    Parameters
    ----------
    points : sequence of Point
        Of a sweep.
    configs : sequence of Config
        Of the points.
    """
    before = [
        run for run in _earlier() if configs and run.config.experiment == configs[0].experiment
    ]
    start = _start_seconds()
    pairs = zip(points, configs, strict=True)
    found = [_of_point(config, point.clients, before, start) for point, config in pairs]
    if not any(each.seconds for each in found):
        return found, "no estimate: no run of this experiment and model has finished here yet"
    begun = f"{start:.0f} s for Flower's start" if start else "without Flower's start"
    return found, f"estimated by {len(before)} earlier runs of this experiment; {begun}"


def _of_point(config: Config, clients: int, before: list[_Before], start: float) -> Estimate:
    """The median of what runs of the same model took for a unit of work, times this one's."""
    work = _work(config, clients)
    alike = [run for run in before if run.config.model == config.model]
    units = [(run, _work(run.config, run.clients)) for run in alike]
    # By tokens if all are known, else by rounds.
    index = 0 if work[0] and all(unit[0] for _, unit in units) else 1
    seconds = [run.seconds / unit[index] for run, unit in units]
    mb = [run.mb / unit[index] for run, unit in units if run.config.link == config.link]
    return Estimate(
        seconds=statistics.median(seconds) * work[index] + start if seconds else None,
        mb=statistics.median(mb) * work[index] if mb else None,
    )


def _work(config: Config, clients: int) -> tuple[int, int]:
    """Tokens that are to be trained on, 0 if that depends on the data; and clients times rounds."""
    train = config.train
    rounds = train.rounds * max(clients, 1)
    tokens = train.local_steps * train.accumulate * train.batch_size * config.data.context
    return rounds * tokens, rounds


def _earlier() -> list[_Before]:
    found = []
    for folder, summary in read_summaries()[-RUNS:]:
        if summary.get("status") == FINISHED and not summary.get("resumed"):
            run = _before(folder, summary)
            found += [] if run is None else [run]
    return found


def _before(folder: Path, summary: dict[str, Any]) -> _Before | None:
    try:
        return _Before(
            config=load_config(str(folder / "config.yaml")),
            clients=int(summary["clients"]),
            seconds=float(summary["seconds"]),
            mb=(summary["bytes_up"] + summary["bytes_down"]) / 1e6,
        )
    except (ConfigError, OSError, LookupError, TypeError):  # of an earlier Graft
        return None


def _start_seconds() -> float:
    """What simulated points took beyond their runs' own seconds; 0 if none was measured."""
    extra = []
    for path in sorted(sweeps_folder().glob(f"*/{FILE}"))[-RUNS:]:
        try:
            sweep = read_sweep(path.parent)
        except ValueError:
            continue
        runs = {point.run: point for point in sweep.points if point.status == "finished"}
        summaries = {str(folder): told for folder, told in read_summaries()} if runs else {}
        for run, point in runs.items():
            if run in summaries and not sweep.superlink and not summaries[run].get("resumed"):
                extra.append(max(0.0, point.seconds - summaries[run]["seconds"]))
    return statistics.median(extra) if extra else 0.0
