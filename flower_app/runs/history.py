"""What a run folder tells of its run, read once, or again and again while the run goes on.

Every reader of `metrics.jsonl` goes through here: what was undone is left out, torn lines are
passed over, times a run was stopped are taken out, and records of earlier Grafts are understood.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from flower_app.runs.folders import began, read_summary
from flower_app.runs.instants import BEFORE_ALL, instant
from flower_app.runs.journal import read_line

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
RUNNING, UNFINISHED = "running", "unfinished"
"""States of a run without a summary; the others are those of `folders`."""

NEEDED = {
    "step": ("client",),
    "asked": ("attempt", "training", "clients"),
    "answered": ("attempt", "training", "client", "why"),
}
"""What a record of a kind is none without, besides its round."""

Record = dict[str, Any]
"""A line of `metrics.jsonl`, and `at`: seconds that the run had been going by then."""


@dataclass(kw_only=True)
class History:
    """A run, as its folder tells it."""

    folder: Path
    config: Record = field(default_factory=dict)
    """Of `config.yaml`, by section; empty if it cannot be read."""
    status: str = UNFINISHED
    """running, unfinished (stopped or killed without a word), finished, stopped or failed."""
    summary: Record | None = None
    environment: Record = field(default_factory=dict)
    """Of the last process that wrote it; empty for an earlier Graft's."""
    model: str = ""
    """What the trunk was cut from, in words; empty for an earlier Graft's."""
    started: datetime | None = None
    last: datetime | None = None
    """The instant of the last record; None for an earlier Graft's."""
    seconds: float = 0.0
    """Of running time up to the last record."""
    estimated: bool = False
    """Whether times are made of durations, for want of instants."""
    steps: list[Record] = field(default_factory=list)
    """Optimizer steps, those of undone attempts left out."""
    rounds: list[Record] = field(default_factory=list)
    """Rounds that are over, round 0 being the evaluation before training; `trained_at` is when."""
    trained: Record | None = None
    """The round that is trained and not evaluated yet."""
    asked: list[Record] = field(default_factory=list)
    answered: list[Record] = field(default_factory=list)
    """Who was asked, and what became of each answer; undone attempts too."""
    resumes: list[Record] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    """Numbers of lines that are no records."""

    @property
    def planned(self) -> int | None:
        """Rounds that the run is to have."""
        train = self.config.get("train")
        rounds = train.get("rounds") if isinstance(train, dict) else None
        return rounds if isinstance(rounds, int) else None


def read_history(folder: Path) -> History:
    """Read what a run folder tells; damaged lines are passed over with a warning.

    Raises
    ------
    ValueError
        If there is neither a `metrics.jsonl` nor a `summary.json` in it.
    """
    if not (folder / METRICS).exists() and read_summary(folder) is None:
        raise ValueError(f"{folder} is no run folder: it has no {METRICS} and no summary.json")
    history = Follower(folder).poll()
    if history.damaged:
        logger.warning(
            "%s: %d lines are no records and are passed over, the first is line %d",
            folder / METRICS,
            len(history.damaged),
            history.damaged[0],
        )
    return history


def _is_whole(record: Record) -> bool:
    """Whether a record has what every Graft writes of its kind."""
    return all(key in record for key in NEEDED.get(record.get("kind", "round"), ()))


class Follower:
    """Reads a run folder again and again, each time only what is new in it.

    Parameters
    ----------
    folder : Path
        The run folder; what is not in it yet may come.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._inode: int | None = None
        self._origin: datetime | None = None
        self._config_seen: tuple[int, int] | None = None
        self._begin()

    def poll(self) -> History:
        """Return the run so far: the same object each time, until a resume cuts the record back."""
        path, history = self._folder / METRICS, self._history
        with suppress(FileNotFoundError), path.open("rb") as file:
            found = os.fstat(file.fileno())
            if self._inode not in (None, found.st_ino) or found.st_size < self._offset:
                self._begin()
                history = self._history
            self._inode = found.st_ino
            file.seek(self._offset)
            self._read(file.read())
        history.config = self._read_config() or history.config
        history.summary = read_summary(self._folder)
        history.status = status_of(self._folder, history.summary)
        if history.started is None and (start := began(self._folder)) != BEFORE_ALL:
            history.started = start
        return history

    def _begin(self) -> None:
        self._history = History(folder=self._folder)
        self._offset, self._line = 0, 0
        self._inode = self._origin = self._config_seen = None
        self._over = 0.0  # seconds of the rounds that are over, where records have no instants
        self._spent: dict[str, float] = {}
        self._attempts: dict[int, int] = {}

    def _read(self, text: bytes) -> None:
        """Take whole lines; what stands behind the last newline only if it is a whole record."""
        *lines, rest = text.split(b"\n")
        for line in lines:
            self._offset += len(line) + 1
            self._line += 1
            record = read_line(line)
            if record is not None and _is_whole(record):
                self._take(record)
            elif line.strip():
                self._history.damaged.append(self._line)
        if (record := read_line(rest)) is not None and _is_whole(record):
            self._offset += len(rest)
            self._take(record)

    def _take(self, record: Record) -> None:
        history, kind = self._history, record.get("kind", "round")
        self._date(record, kind)
        if kind in ("start", "resume"):
            history.environment = record.get("environment") or history.environment
        if kind == "resume":
            history.resumes.append(record)
        elif kind == "model":
            history.model = str(record.get("model", ""))
        elif kind == "asked":
            self._attempt(record)
            history.asked.append(record)
        elif kind == "answered":
            history.answered.append(record)
        elif kind == "step" and self._attempt(record):
            history.steps.append(record)
        elif kind == "trained":
            history.trained = record
        elif kind == "round":
            told = [*record.get("clients", ()), *record.get("missing", ())]
            record.setdefault("asked", sorted(told))  # an earlier Graft's does not say
            if history.trained is not None:
                record["trained_at"] = history.trained["at"]
            history.rounds.append(record)
            history.trained = None

    def _attempt(self, record: Record) -> bool:
        """Drop steps of attempts before this one; whether this one is not such a step itself."""
        number, attempt = record["round"], record.get("attempt", 1)
        known = self._attempts.get(number, 1)
        if attempt > known:
            self._attempts[number] = attempt
            steps = self._history.steps
            steps[:] = [step for step in steps if step["round"] != number]
        return bool(attempt >= known)

    def _date(self, record: Record, kind: str) -> None:
        """Set `at`. The time between a stop and the resume after it does not count."""
        history = self._history
        moment = instant(record.get("time"))
        if moment == BEFORE_ALL:
            history.estimated, history.seconds = True, self._estimate(record, kind)
        else:
            if kind == "start":
                history.started = moment
            if kind == "resume" or self._origin is None:
                self._origin = moment - timedelta(seconds=history.seconds)
            past = (moment - self._origin).total_seconds()
            history.seconds, history.last = max(history.seconds, past), moment
            self._over = history.seconds if kind == "round" else self._over
        record["at"] = history.seconds

    def _estimate(self, record: Mapping[str, Any], kind: str) -> float:
        """Seconds by which a record without an instant was written, by durations in the record."""
        if kind == "step":
            taken = sum((record.get("seconds") or {}).values())
            client = str(record.get("client"))
            self._spent[client] = self._spent.get(client, 0.0) + taken
            return max(self._history.seconds, self._over + self._spent[client])
        seconds = record.get("seconds")
        if kind not in ("round", "trained") or not isinstance(seconds, int | float):
            return self._history.seconds
        past = max(self._history.seconds, self._over + seconds)
        if kind == "round":
            self._over, self._spent = past, {}
        return past

    def _read_config(self) -> Record | None:
        """The configuration if it is new; a resume may have changed it."""
        try:
            found = (self._folder / "config.yaml").stat()
            seen = (found.st_mtime_ns, found.st_size)
            if seen == self._config_seen:
                return None
            told = yaml.safe_load((self._folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return None
        self._config_seen = seen
        return told if isinstance(told, dict) else None


def status_of(folder: Path, summary: Mapping[str, Any] | None) -> str:
    """Return how a run is: what its summary says, or whether a process holds its folder's lock."""
    if summary is not None:
        return str(summary["status"])
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return UNFINISHED
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return RUNNING
    finally:
        os.close(handle)
    return UNFINISHED
