"""Who was asked, who answered and who was dropped, attempt by attempt; and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flower_app.runs.history import History, Record


@dataclass(kw_only=True)
class Asking:
    """A cohort that was asked for one thing."""

    round: int
    attempt: int
    training: bool
    asked: list[str]
    answered: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Reasons by name."""
    undone: bool = False
    """The attempt had no quorum, and nothing of it counts."""
    at: float | None = None
    """Seconds of running time; None for an earlier Graft's record."""

    @property
    def label(self) -> str:
        """Of its column: the round, its attempt if there was another, and what for."""
        again = f".{self.attempt}" if self.training and (self.undone or self.attempt > 1) else ""
        return f"{self.round}{again} {'train' if self.training else 'eval'}"

    def told(self) -> dict[str, Any]:
        """As plain data, with its label and each client's outcome."""
        outcomes = {name: self.outcome(name) for name in self.asked}
        return vars(self) | {"label": self.label, "outcomes": outcomes}

    def outcome(self, client: str) -> str:
        """What became of a client: answered, undone, missing, waiting or not asked."""
        if client in self.missing:
            return "missing"
        if client in self.answered:
            return "undone" if self.undone else "answered"
        return "waiting" if client in self.asked else "not asked"


def askings(history: History) -> list[Asking]:
    """Return all cohorts of a run in the order in which they were asked."""
    found = {(a.round, a.training, a.attempt): a for a in _of_events(history)}
    for record in history.rounds + ([history.trained] if history.trained else []):
        for asking in _of_round(record):
            key = (asking.round, asking.training, asking.attempt)
            if key in found:
                asking.at = found[key].at
            found[key] = asking
    return sorted(found.values(), key=lambda a: (a.round, not a.training, a.attempt))


def _of_events(history: History) -> list[Asking]:
    """What events tell: also of attempts whose round is not over, or never was."""
    found: dict[tuple[int, bool, int], Asking] = {}
    for record in history.asked:
        place = {key: record[key] for key in ("round", "attempt", "training")}
        asking = Asking(**place, asked=list(record["clients"]), at=record["at"])
        found[asking.round, asking.training, asking.attempt] = asking
    for record in history.answered:
        told = found.get((record["round"], record["training"], record["attempt"]))
        if told is None:
            continue
        if record["why"]:
            told.missing[record["client"]] = record["why"]
        else:
            told.answered.append(record["client"])
    last = {(a.round, a.training): a.attempt for a in found.values()}
    for asking in found.values():
        failed = history.status == "failed" and _is_last_training(asking, history)
        asking.undone = asking.training and (
            asking.attempt < last[asking.round, asking.training] or failed
        )
    return list(found.values())


def _is_last_training(asking: Asking, history: History) -> bool:
    """Whether a round was never trained."""
    done = {record["round"] for record in history.rounds}
    done |= {history.trained["round"]} if history.trained else set()
    return asking.training and asking.round not in done


def _of_round(record: Record) -> list[Asking]:
    """What a round's record tells, which an earlier Graft's has too."""
    number, abandoned = record["round"], record.get("abandoned") or []
    found = [
        _asking(turnout, number, attempt, training=True, undone=True)
        for attempt, turnout in enumerate(abandoned, start=1)
    ]
    last, evaluation = len(abandoned) + 1, record.get("evaluation")
    training = number > 0 and (record.get("train") is not None or evaluation is not None)
    if record.get("asked"):
        found.append(_asking(record, number, last, training=training))
    if evaluation:
        found.append(_asking(evaluation, number, last, training=False))
    return found


def _asking(
    turnout: Mapping[str, Any], number: int, attempt: int, *, training: bool, undone: bool = False
) -> Asking:
    return Asking(
        round=number,
        attempt=attempt,
        training=training,
        asked=list(turnout.get("asked") or ()),
        answered=list(turnout.get("clients") or ()),
        missing=dict(turnout.get("missing") or {}),
        undone=undone,
    )
