"""The commands that repeat a run, or go on with it."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path

from flower_app.runs.folders import FINISHED, folders, newest_round
from flower_app.runs.history import RUNNING, History


def commands(history: History, seen: int) -> dict[str, str]:
    """Return what is done by which command; `seen` clients at least were connected."""
    folder, count = history.folder, max(seen, _connected(history), 1)
    config = folder / "config.yaml"
    found = {
        "repeat": f"graft run {shlex.quote(str(config))} --clients {count}",
        "repeat, with Flower's own command": (
            f"flwr run . --stream --run-config {_setting('experiment', config)}"
            f' --federation-config "num-supernodes={count}"'
        ),
    }
    if history.status not in (RUNNING, FINISHED) and newest_round(folder) is not None:
        found["go on"] = f"graft resume {shlex.quote(str(folder))}"
        found["go on, with Flower's own command"] = (
            f"flwr run . --stream --run-config {_setting('resume', folder)}"
        )
    return found


def _setting(key: str, path: Path) -> str:
    """A run config of Flower's, quoted for a shell."""
    text, harmless = f"{key}='{path}'", shlex.quote(str(path)) == str(path)
    return f'"{text}"' if harmless else shlex.quote(text)


def _connected(history: History) -> int:
    """How many clients were connected, as the newest checkpoint says; 0 if there is none."""
    for _, path in folders(history.folder)[-1:]:
        with suppress(OSError, ValueError, TypeError, KeyError):
            return len(json.loads((path / "state.json").read_text(encoding="utf-8"))["clients"])
    return 0
