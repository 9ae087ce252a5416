"""Run folders as a run leaves them at any moment, without the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from conf.load import load_config, to_yaml

BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)
SECONDS = {"bottom": 0.1, "network": 0.2, "trunk": 0.6, "top": 0.1}


class Story:
    """Writes the records of a run, second by second."""

    def __init__(self, folder: Path, rounds: int = 3, name: str = "20260101-120000-demo") -> None:
        self.folder, self.second = folder / name, 0.0
        self.folder.mkdir(parents=True)
        config = load_config("demo", f"train.rounds={rounds}")
        (self.folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        self.write(kind="start", round=0, environment={"cpus": 2})
        self.write(kind="model", round=0, model="llama of 6 blocks x 128")

    @property
    def now(self) -> datetime:
        return BEGAN + timedelta(seconds=self.second)

    def write(self, **record: Any) -> None:
        line = json.dumps({**record, "time": self.now.isoformat()})
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def wait(self, seconds: float) -> None:
        self.second += seconds

    def ask(self, number: int, clients: Sequence[str], *, training: bool, attempt: int = 1) -> None:
        self.write(
            kind="asked", round=number, attempt=attempt, training=training, clients=list(clients)
        )

    def step(
        self,
        number: int,
        client: str,
        step: int,
        *,
        steps: int = 10,
        loss: Any = None,
        attempt: int = 1,
    ) -> None:
        told = 5.0 / (number + step / steps) if loss is None else loss
        self.write(
            kind="step", round=number, client=client, step=step, steps=steps, loss=told, tokens=100,
            grad_norm=1.0, lr=0.01, bytes_up=1000, bytes_down=2000, seconds=SECONDS,
            **({"attempt": attempt} if attempt > 1 else {}),
        )  # fmt: skip

    def answer(
        self, number: int, client: str, why: str = "", *, training: bool, attempt: int = 1
    ) -> None:
        self.write(
            kind="answered",
            round=number,
            attempt=attempt,
            training=training,
            client=client,
            why=why,
        )

    def end(
        self,
        number: int,
        clients: Sequence[str],
        missing: Mapping[str, str] = {},
        seconds: float = 10.0,
    ) -> None:
        self.write(
            kind="round", round=number, train={"loss": 4.0 / number} if number else None,
            evaluate={"loss": 5.0 / (number + 1)}, asked=sorted([*clients, *missing]),
            clients=list(clients), missing=dict(missing), tokens=1000 if number else 0,
            bytes_up=10_000, bytes_down=20_000, seconds=seconds,
            per_client={name: {"evaluate": {"loss": 5.0 / (number + 1)}} for name in clients},
            memory={"server_mb": 640.0, "server_peak_mb": 700.0},
        )  # fmt: skip

    def round(self, number: int, clients: Sequence[str], missing: Mapping[str, str] = {}) -> None:
        """A whole round of ten seconds."""
        if number:
            self.ask(number, [*clients, *missing], training=True)
            for step in range(1, 11):
                self.wait(0.8)
                for client in clients:
                    self.step(number, client, step)
            for client in clients:
                self.answer(number, client, training=True)
            for client, why in missing.items():
                self.answer(number, client, why, training=True)
        self.ask(number, clients, training=False)
        self.wait(2.0)
        for client in clients:
            self.answer(number, client, training=False)
        self.end(number, clients, missing)

    def summary(self, status: str, **told: Any) -> None:
        text = json.dumps(
            {
                "status": status,
                "finished": self.now.isoformat(),
                **told,
            }
        )
        (self.folder / "summary.json").write_text(text, encoding="utf-8")
