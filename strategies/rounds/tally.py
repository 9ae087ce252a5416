"""A round as it is reported: who was asked, who answered, who was dropped and why."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from strategies.events import RoundDone, StepDone, Turnout, anomaly_words
from strategies.memory import server_memory
from strategies.rounds.answers import Answer
from strategies.transport.conversation import StepReport

logger = logging.getLogger(__name__)

_CALLED = {"steps": "num-steps"}
"""What a client's counters are called in a round's record, where that differs."""


@dataclass(kw_only=True)
class Tally:
    """Round `number` so far: its training, the attempts at it that failed, and its evaluation."""

    number: int
    started: float = field(default_factory=time.monotonic)
    training: Turnout | None = None
    evaluation: Turnout | None = None
    abandoned: list[Turnout] = field(default_factory=list)
    train: dict[str, float] | None = None
    evaluate: dict[str, float] | None = None
    central: Mapping[str, float] | None = None
    tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    per_client: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    anomalies: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def attempt(self) -> int:
        """Number of the attempt that is due, from 1."""
        return len(self.abandoned) + 1

    def fold(self, answers: Sequence[Answer], what: str) -> dict[str, float]:
        """Sum counters and weight the loss by tokens; keep each client's by `what` they are of."""
        for answer in answers:
            told = {_CALLED.get(name, name): value for name, value in answer.metrics.items()}
            self.per_client[answer.client] = self.per_client.get(answer.client, {}) | {what: told}
        tokens = sum(answer.metrics["num-tokens"] for answer in answers)
        loss = sum(a.metrics["loss"] * a.metrics["num-tokens"] for a in answers) / tokens
        self.bytes_up += int(sum(answer.metrics["bytes-up"] for answer in answers))
        self.bytes_down += int(sum(answer.metrics["bytes-down"] for answer in answers))
        return {"loss": loss, "num-tokens": tokens, "clients": len(answers)}

    def note(self, anomalies: Mapping[str, Mapping[str, float]]) -> None:
        """Keep, and log, which clients' updates are far from the others'."""
        for client, told in anomalies.items():
            logger.warning("round %d: %s stands out: %s", self.number, client, anomaly_words(told))
            self.anomalies[client] = {**self.anomalies.get(client, {}), **told}

    def state_dict(self) -> dict[str, Any]:
        """What of a trained round its report will need; it is not evaluated yet."""
        kept = asdict(self)
        del kept["started"], kept["evaluation"], kept["evaluate"], kept["central"]
        return {**kept, "seconds": time.monotonic() - self.started}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tally:
        """Go back to a `state_dict`."""
        told = dict(state)
        started = time.monotonic() - told.pop("seconds")
        training = Turnout(**told.pop("training"))
        abandoned = [Turnout(**turnout) for turnout in told.pop("abandoned")]
        return cls(**told, started=started, training=training, abandoned=abandoned)

    def event(self) -> RoundDone:
        """The round, now that it is over.

        Tokens and bytes are those of the answers that were used: an abandoned attempt has none.
        """
        return RoundDone(
            round=self.number,
            train=self.train,
            evaluate=self.evaluate,
            central=self.central,
            training=self.training,
            evaluation=self.evaluation,
            abandoned=tuple(self.abandoned),
            tokens=self.tokens,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            seconds=time.monotonic() - self.started,
            per_client={name: self.per_client[name] for name in sorted(self.per_client)},
            memory=server_memory(),
            anomalies=self.anomalies,
        )


def step_done(report: StepReport) -> StepDone:
    """A step from the data plane, with the round it belongs to."""
    number, attempt = map(int, report.key.split("-")[1].split("."))
    told = {**vars(report), "round": number, "attempt": attempt, "step": report.step + 1}
    del told["key"]
    return StepDone(**told)
