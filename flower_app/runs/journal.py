"""`metrics.jsonl`: lines that outlive a full disk, cut back to a round when a run is resumed."""

from __future__ import annotations

import codecs
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from strategies.events import Answered, Asked, Event, RoundTrained, StepDone, Stopped, Turnout

logger = logging.getLogger(__name__)


class Journal:
    """Appends lines to a file, whole ones only.

    What cannot be written is kept in memory and written as soon as it can be: a full disk must not
    end the session of the client whose step is recorded.

    Parameters
    ----------
    path : Path
        The file; made if it is not there.
    say : callable
        Takes a line for the console when a write that failed is made up for.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._owed: list[bytes] = []

    def write(self, line: str) -> None:
        """Append a line, or keep it until it can be."""
        first = not self._owed
        self._owed.append(f"{line}\n".encode())
        try:
            self._pay()
        except OSError as error:
            if first:
                logger.warning(
                    "%s cannot be written: %s. The run goes on and keeps the lines in memory; free "
                    "space, and they are written",
                    self._path,
                    error.strerror or error,
                )
        else:
            if not first:
                self._say(f"{self._path} can be written again; nothing is lost")

    def sync(self) -> None:
        """Have everything on the disk, or raise OSError."""
        self._pay()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is still owed; OSError if that cannot be."""
        try:
            self._pay()
        finally:
            self._file.close()

    def _pay(self) -> None:
        text = b"".join(self._owed)
        try:
            left = memoryview(text)
            while left:  # a disk may take a part and refuse the rest
                left = left[os.write(self._file.fileno(), left) :]
        except OSError:
            os.truncate(self._path, self._size)
            raise
        self._size += len(text)
        self._owed.clear()


def as_record(event: Event) -> dict[str, Any]:
    """Return what a line says of an event. A round's `evaluation` is that after training."""
    if isinstance(event, StepDone):
        record = {"kind": "step", **vars(event), "seconds": dict(event.seconds)}
        if event.attempt == 1:
            del record["attempt"]
        return record
    if isinstance(event, RoundTrained):
        return {**as_record(event.so_far), "kind": "trained"}
    if isinstance(event, Asked | Answered):
        return {"kind": type(event).__name__.lower(), **vars(event)}
    if isinstance(event, Stopped):
        told = {"kind": "stop", **vars(event)}
        return told if event.why else {k: v for k, v in told.items() if k != "why"}
    first = event.training or event.evaluation or Turnout()
    record = {
        "kind": "round",
        "round": event.round,
        "train": None if event.train is None else dict(event.train),
        "evaluate": None if event.evaluate is None else dict(event.evaluate),
        "asked": sorted(first.asked),
        "clients": sorted(first.clients),
        "missing": dict(first.missing),
        "tokens": event.tokens,
        "bytes_up": event.bytes_up,
        "bytes_down": event.bytes_down,
        "seconds": event.seconds,
    }
    if event.central is not None:
        record["central"] = dict(event.central)
    if event.training and event.evaluation:
        record["evaluation"] = _turnout(event.evaluation)
    if event.abandoned:
        record["attempts"] = len(event.abandoned) + 1
        record["abandoned"] = [_turnout(turnout) for turnout in event.abandoned]
    for key in ("per_client", "memory", "anomalies", "epsilon"):
        if told := getattr(event, key):
            record[key] = told
    return record


def dumps(record: Any, indent: int | None = None) -> str:
    """Return strict JSON; a number that is not finite becomes null."""
    return json.dumps(_finite(record), indent=indent, allow_nan=False)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a journal; what a kill or a power cut left at its end is passed over.

    Raises
    ------
    ValueError
        If a damaged line is followed by a record: its number, and what is wrong.
    """
    damaged = None
    for line in _lines(path):
        if line.record is None:
            damaged = damaged or line
        elif damaged:
            raise ValueError(damaged.complaint(path))
        else:
            yield line.record


def read_line(line: bytes) -> dict[str, Any] | None:
    """Return the record of one line; None if it is none."""
    return _read_line(0, line.removeprefix(codecs.BOM_UTF8)).record


def require_round(path: Path, number: int, *, kind: str = "round") -> None:
    """Refuse a journal, with ValueError, that lost its lines up to the end of a round.

    `kind`: "trained" if the round is yet to be evaluated.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: without it this run cannot be resumed")
    records = [line.record for line in _lines(path) if line.record is not None]
    ended = [record["round"] for record in records if record.get("kind") == kind]
    if number not in ended:
        last = max((one for one in ended if one < number), default=0)
        remedy = f"resume from the checkpoint of round {last} or before, or" if last else ""
        raise ValueError(
            f"{path} does not hold round {number}, which the checkpoint follows: it was cut off or "
            f"emptied. Put it back, or {remedy} begin the run anew".replace("  ", " ")
        )


def cut_back(path: Path, number: int, *, unevaluated: bool = False) -> list[dict[str, Any]]:
    """Drop what came after round `number`, whatever it is: cut off lines, NULs, garbage.

    Parameters
    ----------
    path : Path
        A `metrics.jsonl`; replaced at once, so that a kill leaves the old one or the new one.
    number : int
        The last round that stays.
    unevaluated : bool
        Its report goes, and who was asked to evaluate it: it is evaluated again.

    Returns
    -------
    list of dict
        The records that stay.

    Raises
    ------
    ValueError
        If a line before the end of that round is damaged.
    """
    lines = list(_lines(path))
    stay = [
        line
        for line in lines
        if line.record is not None
        and line.record["round"] <= number
        and not (unevaluated and line.record["round"] == number and _evaluates(line.record))
    ]
    ends = [line.place for line in stay if _kind(line) in ("round", "trained")]
    end = max(ends, default=0)
    for line in lines:
        if line.record is None and line.place < end:
            raise ValueError(
                f"{line.complaint(path)}. It belongs to a round that stays: mend or remove it, or "
                "resume from a checkpoint before it"
            )
    replace_whole(path, "".join(f"{line.text}\n" for line in stay))
    return [line.record for line in stay if line.record is not None]


class _Line(NamedTuple):
    place: int
    """In its file, from 1."""
    text: str
    record: dict[str, Any] | None
    """None: it is damaged."""
    problem: str = ""

    def complaint(self, path: Path) -> str:
        return f"{path}, line {self.place} is no record of a run: {self.problem}"


def _evaluates(record: Mapping[str, Any]) -> bool:
    """Whether a line is of what comes after a round's training."""
    return record.get("kind", "round") == "round" or record.get("training") is False


def _kind(line: _Line) -> str:
    return str((line.record or {}).get("kind", "round"))


def _lines(path: Path) -> Iterator[_Line]:
    """Lines that are not empty; a byte order mark and CR before LF, which editors add, are none."""
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for place, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            yield _read_line(place, line)


def _read_line(place: int, line: bytes) -> _Line:
    try:
        text = line.decode("utf-8").strip()
        record = json.loads(text, parse_constant=lambda name: None)  # as `dumps` writes NaN
        if type(record["round"]) is not int:
            raise ValueError(f"its round is {record['round']!r}")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        return _Line(place, "", None, repr(error))
    return _Line(place, text, record)


def _turnout(turnout: Turnout) -> dict[str, Any]:
    return {**vars(turnout), "missing": dict(turnout.missing)}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def replace_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, finds the old one or all of the new one."""
    draft = path.with_name(f"{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
