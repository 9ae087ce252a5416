"""A run at one instant: how far it is, how it learns, how long it will take."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from flower_app.runs.history import RUNNING, History
from simulations.watch.clients import Client, clients_of

WINDOW = 60.0
"""Seconds over which the run's speed is measured."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What a frame shows."""

    history: History
    elapsed: float
    """Seconds of running time, up to now if the run is going."""
    silent: float
    """Of these, those since the last record."""
    left: float | None
    """Seconds that the run will take still; None: nobody can say yet."""
    current: dict[str, Any] | None
    """The record by which the cohort that is at work was asked."""
    number: int
    """The round that is under way, or the last one."""
    over: int
    """The last round that is over."""
    done: float
    """Share of this round's training that is done."""
    clients: list[Client]
    speed: float | None
    """Tokens per second of all clients."""
    bytes_up: int
    bytes_down: int
    server_mb: float | None = None
    """Memory of the server's process, now if it is on this machine, else at the last round."""
    peak_mb: float | None = None
    notes: list[str] = field(default_factory=list)
    """What deserves attention, the newest last."""

    @property
    def rounds(self) -> int:
        """That the run is to have."""
        return self.history.planned or max(self.number, 1)


def state_of(history: History, now: datetime, server_mb: float | None = None) -> State:
    """Return the run at an instant.

    Parameters
    ----------
    history : History
        The run so far.
    now : datetime
        The instant, in UTC.
    server_mb : float, optional
        Memory of the process that writes it, if it is known.
    """
    going = history.status == RUNNING
    silent = max(0.0, (now - history.last).total_seconds()) if going and history.last else 0.0
    elapsed = history.seconds + silent
    current = _current(history)
    clients = clients_of(history, current)
    number = current["round"] if current else _last_round(history)
    done = _done(clients, current, history)
    up, down = _bytes(history)
    return State(
        history=history,
        elapsed=elapsed,
        silent=silent,
        left=_left(history, elapsed, number, done) if going else None,
        current=current if going else None,
        number=number,
        over=_last_round(history),
        done=done,
        clients=clients,
        speed=_speed(history, elapsed),
        bytes_up=up,
        bytes_down=down,
        server_mb=server_mb or _memory(history, "server_mb"),
        peak_mb=max(server_mb or 0.0, _memory(history, "server_peak_mb") or 0.0) or None,
        notes=_notes(history),
    )


def _current(history: History) -> dict[str, Any] | None:
    """The cohort that is at work: the last that was asked, until its round's record comes."""
    if not history.asked:
        return None
    last = history.asked[-1]
    over = history.rounds and history.rounds[-1]["round"] >= last["round"]
    return None if over else last


def _last_round(history: History) -> int:
    return int(history.rounds[-1]["round"]) if history.rounds else 0


def _done(clients: list[Client], current: dict[str, Any] | None, history: History) -> float:
    """Share of the training of the round that is under way, by its clients' steps."""
    if current is None or not current["training"]:
        return 1.0
    names, usual = set(current["clients"]), max((c.steps for c in clients), default=0)
    asked = [client for client in clients if client.name in names]
    planned = sum(client.steps or usual for client in asked)
    taken = sum(
        client.steps or usual if client.phase in ("answered", "missing") else client.step
        for client in asked
    )
    return taken / planned if planned else 0.0


def _left(history: History, elapsed: float, number: int, done: float) -> float | None:
    """By what rounds took so far; in the first one, by how much of it is done."""
    planned = history.planned
    if planned is None:
        return None
    over = [record for record in history.rounds if record["round"] > 0]
    since = elapsed - (history.rounds[-1]["at"] if history.rounds else 0.0)
    if over:
        each = sum(record["seconds"] for record in over) / len(over)
        due = planned - over[-1]["round"]
        return max(0.0, each - since) + each * (due - 1) if due else 0.0
    if number < 1 or done < 0.05:
        return None
    return since / done * planned - since


def _speed(history: History, elapsed: float) -> float | None:
    """Tokens per second over the last minute of training; over all of it when the run is over."""
    if history.status != RUNNING:
        speed = (history.summary or {}).get("tokens_per_second")
        return float(speed) if speed else None
    begin = max(0.0, elapsed - WINDOW)
    recent = [step for step in history.steps if step["at"] >= begin]
    if len(recent) < 2:
        return None
    asked = [record["at"] for record in history.asked if record["training"]]
    begin = max([begin, *(at for at in asked if at <= recent[0]["at"])])
    span = recent[-1]["at"] - begin
    return sum(step["tokens"] for step in recent) / span if span > 0 else None


def _bytes(history: History) -> tuple[int, int]:
    """Of rounds as they were reported, and of the steps since."""
    over = _last_round(history)
    since = [step for step in history.steps if step["round"] > over]
    up, down = (
        sum(record[key] for record in (*history.rounds, *since))
        for key in ("bytes_up", "bytes_down")
    )
    return up, down


def _memory(history: History, key: str) -> float | None:
    told = [record["memory"][key] for record in history.rounds if key in record.get("memory", {})]
    return float(told[-1]) if told else None


def _notes(history: History) -> list[str]:
    """Clients that were lost, rounds that were tried again, losses that are none, and the end."""
    told: list[tuple[float, str]] = []
    for record in history.answered:
        if record["why"]:
            what = "training" if record["training"] else "evaluation"
            text = f"round {record['round']}: {record['client']} is missing in {what}: "
            told.append((record["at"], text + record["why"]))
    for record in history.asked:
        if record["attempt"] > 1:
            text = f"round {record['round']} had no quorum; attempt {record['attempt']} began"
            told.append((record["at"], text))
    for record in history.steps:
        if record["loss"] is None:
            text = f"round {record['round']}: {record['client']}'s loss is no finite number"
            told.append((record["at"], text))
    for record in history.resumes:
        told.append((record["at"], f"resumed after round {record['round']}"))
    if history.damaged:
        told.append((history.seconds, f"torn lines in metrics.jsonl: {len(history.damaged)}"))
    return [text for _, text in sorted(told, key=lambda note: note[0])]
