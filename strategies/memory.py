"""How much memory this process takes, now and at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

MEGABYTE = 1e6


def peak_bytes() -> int:
    """Return the largest resident set of this process so far.

    Linux keeps in `ru_maxrss` the parent's size across an exec, so its own figure is preferred.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def server_memory() -> dict[str, float]:
    """Return what the server's process takes, in MB of a million bytes.

    Returns
    -------
    dict
        `server_mb`, the resident set now; `server_peak_mb`, its largest so far; and `gpu_peak_mb`,
        what torch has had allocated at most on its current GPU, where there is one.
    """
    found = {
        "server_mb": psutil.Process().memory_info().rss / MEGABYTE,
        "server_peak_mb": peak_bytes() / MEGABYTE,
    }
    if torch.cuda.is_available():
        found["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / MEGABYTE
    return {name: round(value, 1) for name, value in found.items()}
