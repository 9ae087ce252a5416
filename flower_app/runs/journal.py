"""`metrics.jsonl`: lines that outlive a full disk, cut back to a round when a run is resumed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def cut_back(path: Path, number: int) -> list[dict[str, Any]]:
    """Drop what came after round `number`, and a last line that a kill cut off.

    Parameters
    ----------
    path : Path
        A `metrics.jsonl`; replaced at once, so that a kill leaves the old one or the new one.
    number : int
        The last round that stays.

    Returns
    -------
    list of dict
        The records that stay.

    Raises
    ------
    ValueError
        If a line is no record.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: without it this run cannot be resumed")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    kept, records = [], []
    for place, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            stays = record["round"] <= number
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {place} is no record of a run: {error!r}") from error
        if stays:
            kept.append(line)
            records.append(record)
    replace_whole(path, "".join(f"{line}\n" for line in kept))
    return records


def replace_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, finds the old one or all of the new one."""
    draft = path.with_name(f"{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
