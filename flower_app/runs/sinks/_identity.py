"""Who a run is to a tracker: its project, and the id under which a resumed run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flower_app.runs.journal import replace_whole
from flower_app.runs.sinks.registry import Run

PROJECT = "graft"


def project(run: Run, variable: str = "") -> str:
    """Return `tracking.project`, else what the tracker's own environment variable says."""
    return run.config.tracking.project or os.environ.get(variable) or PROJECT


def recall(run: Run, tracker: str) -> dict[str, Any]:
    """Return what `keep` kept; empty for a new run."""
    file = _file(run, tracker)
    if run.after is None or not file.exists():
        return {}
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return told


def keep(run: Run, tracker: str, **told: Any) -> None:
    """Keep in the run's folder what the tracker calls it."""
    file = _file(run, tracker)
    file.parent.mkdir(exist_ok=True)
    replace_whole(file, json.dumps(told) + "\n")


def _file(run: Run, tracker: str) -> Path:
    return run.folder / "tracking" / f"{tracker}.json"
