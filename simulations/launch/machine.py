"""What Flower and Ray need of a machine: what it has, and words for what it lacks."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from conf.rules import ConfigError

SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""The longest path of a socket that the system takes."""
RAY_SOCKET_BYTES = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
"""What Ray appends to its folder to name a socket."""
MEBIBYTE = 2**20
SHARED_MEMORY_MB = 256
"""Of /dev/shm: messages between Ray's processes lie there, with clients' tensors in them."""
DISK_MB = 512
"""For Flower's database, Ray's logs and the app's copy."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is, as measured before a run; None: not known, and not checked."""

    cpus: int
    temporary: Path | None
    """Where Ray's sockets may lie; None if no writable folder has a path short enough."""
    shared_memory: int | None
    """Free bytes of /dev/shm."""
    disk: int
    """Free bytes where temporary files go."""


def look_at_machine() -> Machine:
    """Measure this machine."""
    shared = Path("/dev/shm")
    return Machine(
        cpus=cpus_for_ray(os.cpu_count() or 1, read_quota()),
        temporary=short_parent((tempfile.gettempdir(), "/tmp", "/var/tmp")),
        shared_memory=shutil.disk_usage(shared).free if shared.is_dir() else None,
        disk=shutil.disk_usage(tempfile.gettempdir()).free,
    )


def check_machine(machine: Machine) -> list[str]:
    """Raise a ConfigError, with the remedy, if simulated clients cannot run here.

    Parameters
    ----------
    machine : Machine
        What there is.

    Returns
    -------
    list of str
        What makes them slow.
    """
    if machine.temporary is None:
        raise ConfigError(
            "Ray needs a writable folder for its sockets with a path of at most "
            f"{longest_parent()} bytes; neither {tempfile.gettempdir()} nor /tmp is one: set TMPDIR"
        )
    if machine.disk < DISK_MB * MEBIBYTE:
        raise ConfigError(
            f"{tempfile.gettempdir()} has {machine.disk // MEBIBYTE} MB free, and a run needs "
            f"{DISK_MB}; free space, or set TMPDIR to a folder elsewhere"
        )
    if machine.shared_memory is None or machine.shared_memory >= SHARED_MEMORY_MB * MEBIBYTE:
        return []
    return [
        f"/dev/shm has {machine.shared_memory // MEBIBYTE} MB free: Ray passes messages over the "
        "disk instead, which is slow; in a container, docker run --shm-size=1g"
    ]


def cpus_for_ray(count: int, quota: float | None) -> int:
    """How many CPUs Ray will see.

    Parameters
    ----------
    count : int
        Of the system.
    quota : float or None
        How many a container may use; None: all.
    """
    return count if quota is None else max(1, min(count, int(quota)))


def read_quota(folder: Path = Path("/sys/fs/cgroup")) -> float | None:
    """How many CPUs the control group of this process may use; None: all."""
    try:
        if (folder / "cpu.max").exists():
            allowed, period = (folder / "cpu.max").read_text().split()[:2]
        else:
            allowed = (folder / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu" / "cpu.cfs_period_us").read_text()
        return float(allowed) / float(period) if float(allowed) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no limit is written as "max"
        return None


def longest_parent() -> int:
    """Bytes of the longest path below which Ray's folder, named by `tempfile`, can lie."""
    return SOCKET_PATH_BYTES - RAY_SOCKET_BYTES - len("/graft-12345678")


def short_parent(candidates: tuple[str, ...]) -> Path | None:
    """Return the first writable folder whose path leaves room for Ray's sockets."""
    for name in candidates:
        if len(os.fsencode(name)) <= longest_parent() and os.access(name, os.W_OK | os.X_OK):
            return Path(name)
    return None


def is_free(host: str, port: int) -> bool:
    """Return whether a port can be listened on; 0 always can.

    Parameters
    ----------
    host : str
        A name or an address.
    port : int
        Of TCP.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except OSError:
        return False
    return True
