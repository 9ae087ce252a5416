"""Run folders as runs leave them, made without running anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from flower_app.runs.folders import new_folder, runs_folder
from simulations.launch import preflight
from simulations.sweep import tables
from simulations.sweep.state import FINISHED, Point, Sweep
from simulations.sweep.task import Ended, Task


def make_run(
    losses: Sequence[float], *, tokens: int = 100, peak: float = 50.0, status: str = "finished"
) -> Path:
    """A run folder whose rounds end with these held-out losses; the first is before training."""
    folder = new_folder(runs_folder(), "demo")
    lines = []
    for number, loss in enumerate(losses):
        trained = number > 0
        client = {"loss": loss, "peak-memory-mb": peak + number}
        lines.append({
            "kind": "round", "round": number, "time": f"2026-01-01T00:00:{10 * number:02d}+00:00",
            "train": {"loss": loss + 0.5} if trained else None, "evaluate": {"loss": loss},
            "asked": ["client-0", "client-1"], "clients": ["client-0", "client-1"], "missing": {},
            "tokens": tokens if trained else 0, "bytes_up": 2_000_000, "bytes_down": 1_000_000,
            "seconds": 10.0, "per_client": {"client-0": {"train": client}} if trained else {},
        })  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    summary = {"status": status, "experiment": "demo", "clients": 2, "seconds": 10.0 * len(losses),
               "bytes_up": 2_000_000, "bytes_down": 1_000_000}  # fmt: skip
    if status:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def make_point(number: int, seed: int = 0, **values: object) -> Point:
    """A point that nothing has happened to; `__` in names stands for a dot."""
    named = {key.replace("__", "."): value for key, value in values.items()}
    overrides = [f"{key}={value}" for key, value in named.items()] + [f"seed={seed}"]
    return Point(
        id=f"{number:03d}", values=named, seed=seed, clients=2, overrides=overrides, rounds=2
    )


def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out pictures and the reading of documents, seconds for each sweep that is begun."""
    monkeypatch.setattr(tables, "draw", lambda *arguments: [])
    monkeypatch.setattr(preflight, "_check_documents", lambda *arguments: None)


def make_sweep(points: list[Point]) -> Sweep:
    """A sweep of the demo over whatever its points have."""
    keys = list(dict.fromkeys(key for point in points for key in point.values))
    return Sweep(name="made", experiment="demo", keys=keys, points=points)


class Pretended:
    """Runs a point by leaving a run folder with losses of its own."""

    def __init__(self, *, crash: Sequence[str] = ()) -> None:
        self.ran: list[str] = []
        self._crash = crash

    def __call__(self, task: Task) -> Ended:
        point = task.point
        self.ran.append(point.id)
        if point.id in self._crash:
            task.say("failed: ValueError: no such luck")
            raise RuntimeError("no such luck")
        rate = float(dict(item.split("=", 1) for item in point.overrides).get("train.lr", "1e-3"))
        task.say(f"run folder: {make_run([5.0, 4.0 - rate, 3.0 - rate + point.seed])}")
        for number in (1, 2):
            task.say(f"round {number}/2 | held-out loss {3.0 - rate:.4f} (perplexity 1)")
        return Ended(status=FINISHED)
