"""A short run of two clients as its events tell it, for tests of sinks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from conf.schema import Config, OutputConfig, TrackingConfig, TrainConfig
from flower_app.runs.recorder import Recorder
from strategies.events import Event, RoundDone, StepDone, Turnout

STEPS = 4


def config_for(folder: Path, *sinks: str, project: str = "") -> Config:
    """Of a run of two rounds under `folder`."""
    return replace(
        Config(),
        train=TrainConfig(rounds=2, lr=0.01),
        output=OutputConfig(folder=str(folder)),
        tracking=TrackingConfig(sinks=sinks, project=project),
    )


def loss(round: int, step: int, client: str) -> float:
    """What a step is said to have had; no two are equal."""
    return 5.0 - round - step / 10 + (client == "b") / 100


def events(*rounds: int) -> Iterator[Event]:
    """Steps and end of each of these rounds; 0 is the evaluation before training."""
    for number in rounds:
        for step in range(1, STEPS + 1) if number else ():
            for client in ("a", "b"):
                yield step_of(number, step, client)
        turnout = Turnout(asked=("a", "b", "c"), clients=("a", "b"), missing={"c": "no answer"})
        yield RoundDone(
            round=number,
            train={"loss": 4.0 - number} if number else None,
            evaluate={"loss": 3.0 - number},
            training=turnout if number else None,
            evaluation=turnout,
            tokens=800 if number else 0,
            bytes_up=1000,
            bytes_down=2000,
            seconds=2.0,
        )


def step_of(round: int, step: int, client: str) -> StepDone:
    """One step of one client."""
    return StepDone(
        round=round,
        attempt=1,
        client=client,
        step=step,
        steps=STEPS,
        loss=loss(round, step, client),
        tokens=100,
        grad_norm=1.5,
        lr=0.01,
        bytes_up=10,
        bytes_down=20,
        seconds={"bottom": 0.1, "network": 0.1, "trunk": 0.2, "top": 0.1},
    )


def run(config: Config, *rounds: int) -> tuple[Path, list[str]]:
    """A run of these rounds; returns its folder and what was said."""
    lines: list[str] = []
    recorder = Recorder(config, say=lines.append)
    recorder.start()
    for event in events(*rounds):
        recorder(event)
    recorder.finish()
    return recorder.folder, lines
