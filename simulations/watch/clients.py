"""What each client of a run is at, as the run's record tells it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flower_app.runs.history import History

RECENT = 5
"""Steps over which a client's loss and speed are averaged."""
MISSING, TRAINING, ASKED, EVALUATING, ANSWERED, IDLE = (
    "missing", "training", "asked", "evaluating", "answered", "not asked",
)  # fmt: skip
PHASES = (MISSING, TRAINING, ASKED, EVALUATING, ANSWERED, IDLE)
"""The ones that matter most come first."""


@dataclass(kw_only=True)
class Client:
    """A client, and its part in what is under way."""

    name: str
    phase: str = IDLE
    why: str = ""
    """Of one that is missing."""
    step: int = 0
    steps: int = 0
    """Of the round that is under way, or of its last one."""
    last: float | None = None
    """Seconds of the run at which the last sign of life came; None: none came."""
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Its last steps."""
    bytes_up: int = 0
    bytes_down: int = 0
    """In all steps so far."""
    held_out: float | None = None
    """Its loss in the last evaluation."""

    @property
    def loss(self) -> float | None:
        """Mean of the last steps."""
        known = [step["loss"] for step in self.recent if step["loss"] is not None]
        return sum(known) / len(known) if known else None

    @property
    def speed(self) -> float | None:
        """Tokens per second of the last steps, waiting included."""
        seconds = sum(sum(step["seconds"].values()) for step in self.recent)
        return sum(step["tokens"] for step in self.recent) / seconds if seconds > 0 else None

    @property
    def shares(self) -> dict[str, float]:
        """What part of the last steps' time each of bottom, network, trunk and top took."""
        sums: dict[str, float] = {}
        for step in self.recent:
            for part, seconds in step["seconds"].items():
                sums[part] = sums.get(part, 0.0) + seconds
        total = sum(sums.values())
        return {part: value / total for part, value in sums.items()} if total > 0 else {}


def clients_of(history: History, current: Mapping[str, Any] | None) -> list[Client]:
    """Return all clients that were ever asked, by name.

    Parameters
    ----------
    history : History
        The run so far.
    current : mapping, optional
        The record by which a cohort was asked that has not been done with.
    """
    found: dict[str, Client] = {}
    for name in _names(history):
        found[name] = Client(name=name)
    for step in history.steps:
        _take_step(found[step["client"]], step)
    for record in history.answered:
        client = found[record["client"]]
        client.last = max(client.last or 0.0, record["at"])
    for told in history.rounds:
        for name, of in (told.get("per_client") or {}).items():
            if name in found and "loss" in (of.get("evaluate") or {}):
                found[name].held_out = of["evaluate"]["loss"]
    if current is not None:
        _place(found, history, current)
    else:
        _place_after(found, history)
    return [found[name] for name in sorted(found, key=_natural)]


def _names(history: History) -> Iterable[str]:
    for record in history.asked:
        yield from record["clients"]
    for record in history.rounds:  # an earlier Graft's says so only when a round is over
        yield from record["asked"]
    yield from {record["client"] for record in (*history.steps, *history.answered)}


def _natural(name: str) -> tuple[str, int, str]:
    """`client-10` comes after `client-9`."""
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :]
    return stem, int(digits) if digits else -1, name


def _take_step(client: Client, step: dict[str, Any]) -> None:
    client.step, client.steps, client.last = step["step"], step["steps"], step["at"]
    client.recent.append(step)
    client.bytes_up += step["bytes_up"]
    client.bytes_down += step["bytes_down"]


def _place(found: Mapping[str, Client], history: History, current: Mapping[str, Any]) -> None:
    """Say of each client what it is at in the round that is under way."""
    place = (current["round"], current["attempt"], current["training"])
    answers = {
        record["client"]: record["why"]
        for record in history.answered
        if (record["round"], record["attempt"], record["training"]) == place
    }
    begun = {step["client"] for step in history.steps if step["round"] == current["round"]}
    for name in current["clients"]:
        client = found[name]
        if current["training"] and name not in begun:
            client.step = 0
        if name in answers:
            client.phase = MISSING if answers[name] else ANSWERED
            client.why = answers[name]
        elif not current["training"]:
            client.phase = EVALUATING
        else:
            client.phase = TRAINING if name in begun else ASKED


def _place_after(found: Mapping[str, Client], history: History) -> None:
    """Say of each client what became of it in the last round that is over."""
    for record in history.rounds[-1:]:
        for name in record["clients"]:
            found[name].phase = ANSWERED
        for name, why in record["missing"].items():
            found[name].phase, found[name].why = MISSING, why
