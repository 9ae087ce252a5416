"""Run folders made by hand, of which everything is known."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from conf.load import to_yaml
from conf.schema import Config

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
HOSTILE = "<script>alert(1)</script>&|`*"


def run_folder(parent: Path, name: str, lines: list[str], seed: int = 0, **sections: Any) -> Path:
    """A run folder with this record; `sections` replace those of the default configuration."""
    folder = parent / name
    folder.mkdir(parents=True)
    config = replace(Config(), seed=seed, **sections)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def ended(folder: Path, status: str = "finished", **more: Any) -> Path:
    """The folder, with a summary."""
    told = {"status": status, "started": START.isoformat(), "finished": START.isoformat(), **more}
    (folder / "summary.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def line(kind: str, number: int, at: float | None, **more: Any) -> str:
    """A record, written `at` seconds after the start; None: by an earlier Graft."""
    told = {"kind": kind, "round": number, **more}
    if at is not None:
        told["time"] = (START + timedelta(seconds=at)).isoformat()
    return json.dumps(told)


def step(number: int, place: int, at: float | None, client: str = "a", **more: Any) -> str:
    """Step `place` of 2, of 10 tokens and 3 MB."""
    told = {
        "client": client,
        "step": place,
        "steps": 2,
        "loss": 4.0,
        "tokens": 10,
        "grad_norm": 1.0,
        "lr": 0.1,
        "bytes_up": 1_000_000,
        "bytes_down": 2_000_000,
        "seconds": {"bottom": 0.1, "network": 0.2, "trunk": 0.3, "top": 0.4},
    }
    return line("step", number, at, **(told | more))


def round_(number: int, at: float | None, heldout: float | None, **more: Any) -> str:
    """A round that a and b were asked to train, and answered."""
    told = {
        "train": {"loss": 4.0} if number else None,
        "evaluate": None if heldout is None else {"loss": heldout},
        "asked": ["a", "b"],
        "clients": ["a", "b"],
        "missing": {},
        "tokens": 40 if number else 0,
        "bytes_up": 5_000_000 if number else 1_000_000,
        "bytes_down": 9_000_000 if number else 1_000_000,
        "seconds": 10.0,
    }
    return line("round", number, at, **(told | more))


def small(parent: Path, name: str = "small", seed: int = 0, last: float = 3.0) -> Path:
    """Round 0, then one of two steps by a and b, where round 1 needed two attempts."""
    undone = {"asked": ["a", "b"], "clients": ["a"], "missing": {"b": HOSTILE}}
    turnout = {"asked": ["a", "b"], "clients": ["a", "b"], "missing": {}}
    lines = [
        line("start", 0, 0, environment={"graft": "0.1.0", "cpus": 2}),
        line("model", 0, 0, model="a small model"),
        round_(0, 10, 5.0),
        line("asked", 1, 10, attempt=1, training=True, clients=["a", "b"]),
        step(1, 1, 11, loss=99.0),
        line("answered", 1, 12, attempt=1, training=True, client="a", why=""),
        line("answered", 1, 12, attempt=1, training=True, client="b", why=HOSTILE),
        line("asked", 1, 12, attempt=2, training=True, clients=["a", "b"]),
        *(step(1, n, 12.5 + n, who, attempt=2, loss=6.0 - n) for n in (1, 2) for who in "ab"),
        round_(1, 16, None).replace('"round"', '"trained"', 1),
        round_(1, 20, last, abandoned=[undone], attempts=2, evaluation=turnout),
    ]
    return ended(run_folder(parent, name, lines, seed), seconds=21.0)
