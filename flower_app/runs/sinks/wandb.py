"""Weights & Biases: online for whoever is logged in, else offline into the run's folder.

Its own environment variables hold: WANDB_MODE, WANDB_ENTITY, WANDB_DIR, WANDB_BASE_URL, ...
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from flower_app.runs.folders import FAILED
from flower_app.runs.journal import as_record
from flower_app.runs.sinks._identity import keep, project, recall
from flower_app.runs.sinks._scalars import ROUND, STEP, hyperparameters, scalars
from flower_app.runs.sinks.registry import Run
from strategies.events import Event

NEEDS = "wandb"
CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
BY_STEP = ("train/loss/*", "train/grad_norm/*", "train/lr/*", "train/tokens_per_second/*")


class Sink:
    """Logs scalars over a client's steps and over rounds, and asks nobody for anything."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def start(self) -> None:
        """Begin the run, or go on with the one that was begun before."""
        import wandb

        mode, before = _mode(), recall(self._run, "wandb").get("id")
        self._tracked = tracked = wandb.init(
            project=project(self._run, "WANDB_PROJECT"),
            name=self._run.folder.name,
            id=before,
            resume="allow" if before else None,
            dir=os.environ.get("WANDB_DIR") or str(self._run.folder),
            config={**hyperparameters(self._run.config), "run_folder": str(self._run.folder)},
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )
        keep(self._run, "wandb", id=tracked.id)
        for tag in (*BY_STEP, "seconds/*"):
            tracked.define_metric(tag, step_metric=STEP)
        for tag in ("train/loss", "eval/*", "round/*", "system/*"):
            tracked.define_metric(tag, step_metric=ROUND)
        if mode == "offline":
            place = os.path.dirname(tracked.dir)
            self._run.say(f"W&B offline: {place}; `wandb sync {place}` sends it")
        elif mode != "disabled":
            self._run.say(f"W&B: {tracked.url}")

    def event(self, event: Event) -> None:
        """Log its numbers."""
        if told := scalars(as_record(event)):
            self._tracked.log({**told.values, told.axis: told.step})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Keep the summary, and send or write the rest."""
        self._tracked.summary.update({f"summary/{name}": told for name, told in summary.items()})
        self._tracked.finish(exit_code=1 if summary["status"] == FAILED else 0)


def _mode() -> str:
    """WANDB_MODE, else by whether somebody is logged in: wandb would ask on the terminal."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun"):
        return "offline" if mode == "dryrun" else mode
    if any(os.environ.get(name) for name in CREDENTIALS) or _in_netrc():
        return mode or "online"
    if mode:
        raise RuntimeError(
            f"WANDB_MODE={mode}, and nobody is logged in: set WANDB_API_KEY, or run `wandb login` "
            "as the user whose process the ServerApp is, or leave WANDB_MODE out"
        )
    return "offline"


def _in_netrc() -> bool:
    """Whether `wandb login` was called."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
