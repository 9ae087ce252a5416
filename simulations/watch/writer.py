"""The process that writes a run folder, if it is on this machine, and what memory it takes."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

LOCKS = Path("/proc/locks")


def writer_of(folder: Path, locks: Path = LOCKS) -> int | None:
    """Return the id of the process that has the run folder's lock; None if nobody can tell."""
    try:
        place, lines = os.stat(folder), locks.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    device = f"{os.major(place.st_dev):02x}:{os.minor(place.st_dev):02x}:{place.st_ino}"
    for line in lines:
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[3:6:2] == ["WRITE", device]:
            return int(fields[4]) or None
    return None


def memory_mb(process: int | None) -> float | None:
    """Return a process's resident memory; None if it is gone or not to be asked."""
    if process is None:
        return None
    try:
        return float(psutil.Process(process).memory_info().rss / 2**20)
    except psutil.Error:
        return None
